"""The addresses of the world that the matrix adds to the lab."""

import os

PROXY, DNS = "198.51.100.10", "198.51.100.53"
SINK4, SINK6 = "203.0.113.99", "2001:db8:3::99"  # somewhere in the Internet
PUSHED, PUSHED_NET = "203.0.113.140", "203.0.113.128/26"  # behind a route of DHCP option 121
ADVERTISED, ADVERTISED_NET = "2001:db8:5::99", "2001:db8:5::/48"  # behind a route of a router advertisement
# a local network with public addresses
FALSE_LAN4, FALSE_LAN6 = "203.0.113.200", "2001:db8:3:1::1"
# of the proxy backend; with another one the agents are told by the environment
TUNNEL4, TUNNEL6 = os.environ.get("PROXYVPN_TUNNEL4", "10.255.255.1"), "fd70:7670:6e::1"
MARK = 0x7076706E
OWN_MAC = "02:70:76:00:00:07"  # of the container's device on the uplink

# Ports: each probe has its own, by which packets without a text are told apart. Not in the kernel's ephemeral range.
SOURCE_PORTS = 16  # for each probe, so that a new attempt does not meet an older one
FIRST_SOURCE, FIRST_DESTINATION = 21000, 20000
GROUP4, GROUP6 = "239.80.80.{}", "ff15::80:80:{:x}"  # joined and left by the probes
STANDING4, STANDING6 = "239.80.81.1", "ff15::80:81:1"  # joined all the time: what a query asks for


def source_port(probe, sequence):
    return FIRST_SOURCE + probe * SOURCE_PORTS + sequence % SOURCE_PORTS


def destination_port(probe):
    return FIRST_DESTINATION + probe
