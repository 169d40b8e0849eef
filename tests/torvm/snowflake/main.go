// The server of snowflake, for the tests: what volunteers bring by WebSocket becomes TCP connections to one bridge.
//
//	snowflake ADDRESS:PORT BRIDGE:PORT    listens, and connects to the bridge's ORPort
//
// A WebSocket begins with a token and the client's number, packets follow. The packets of one number, from however many WebSockets, are
// one KCP session; in it are smux streams, and each of these is a connection.
package main

import (
	"bufio"
	"bytes"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"time"

	"git.torproject.org/pluggable-transports/snowflake.git/common/encapsulation"
	"git.torproject.org/pluggable-transports/snowflake.git/common/turbotunnel"
	"git.torproject.org/pluggable-transports/snowflake.git/common/websocketconn"
	"github.com/gorilla/websocket"
	"github.com/xtaci/kcp-go"
	"github.com/xtaci/smux"
)

// As the clients have them.
const (
	windowPackets = 65535
	streamBytes   = 1 << 20
	silence       = 10 * time.Minute
)

// volunteer carries the packets of one WebSocket until it ends.
func volunteer(packets *turbotunnel.QueuePacketConn, conn io.ReadWriteCloser) error {
	defer conn.Close()
	var token [len(turbotunnel.Token)]byte
	var client turbotunnel.ClientID
	if _, err := io.ReadFull(conn, token[:]); err != nil {
		return err
	}
	if !bytes.Equal(token[:], turbotunnel.Token[:]) {
		return io.ErrUnexpectedEOF
	}
	if _, err := io.ReadFull(conn, client[:]); err != nil {
		return err
	}
	log.Printf("client %v", client)
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		defer conn.Close()
		out := bufio.NewWriter(conn)
		for {
			select {
			case <-ended:
				return
			case packet, ok := <-packets.OutgoingQueue(client):
				if !ok {
					return
				}
				if _, err := encapsulation.WriteData(out, packet); err != nil || out.Flush() != nil {
					return
				}
			}
		}
	}()
	for {
		packet, err := encapsulation.ReadData(conn)
		if err != nil {
			return err
		}
		packets.QueueIncoming(packet, client)
	}
}

// session carries the streams of one client until it is silent for long.
func session(conn *kcp.UDPSession, bridge string) error {
	defer conn.Close()
	conn.SetStreamMode(true)
	conn.SetWindowSize(windowPackets, windowPackets)
	conn.SetNoDelay(0, 0, 0, 1)
	config := smux.DefaultConfig()
	config.Version = 2
	config.KeepAliveTimeout = silence
	config.MaxStreamBuffer = streamBytes
	streams, err := smux.Server(conn, config)
	if err != nil {
		return err
	}
	defer streams.Close()
	for {
		stream, err := streams.AcceptStream()
		if err != nil {
			return err
		}
		go func() {
			defer stream.Close()
			or, err := net.Dial("tcp", bridge)
			if err != nil {
				log.Print(err)
				return
			}
			defer or.Close()
			go func() {
				io.Copy(or, stream)
				or.Close()
			}()
			io.Copy(stream, or)
		}()
	}
}

func main() {
	packets := turbotunnel.NewQueuePacketConn(&net.TCPAddr{}, silence)
	listener, err := kcp.ServeConn(nil, 0, 0, packets)
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		for {
			conn, err := listener.AcceptKCP()
			if err != nil {
				log.Fatal(err)
			}
			go func() { log.Printf("session ended: %v", session(conn, os.Args[2])) }()
		}
	}()
	upgrader := websocket.Upgrader{CheckOrigin: func(*http.Request) bool { return true }}
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if ws, err := upgrader.Upgrade(w, r, nil); err == nil {
			log.Printf("volunteer gone: %v", volunteer(packets, websocketconn.New(ws)))
		}
	})
	log.Fatal(http.ListenAndServe(os.Args[1], nil))
}
