/* For the TorVM in the place of Tor: server.c on the port of the transparent proxy. Takes Tor's arguments and ignores them. server.c is
 * compiled with -Dmain=server. */
int server(int argc, char **argv);

int main(void)
{
    char name[] = "server", port[] = "9095", workers[] = "1";
    char *arguments[] = {name, port, workers, 0};
    return server(3, arguments);
}
