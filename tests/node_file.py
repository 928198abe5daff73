"""Configuration files for tests, and the errors of one as a list."""

from dataplane.config import ConfigError, parse

NODE = """
[node]
name = "node1"
addresses = ["192.0.2.11"]
[uplink]
interface = "eth0"
[pods]
cidr = ["10.244.1.0/24"]
[[pods.static]]
name = "web-0"
ip = ["10.244.1.10"]
[[peers]]
name = "node2"
address = "192.0.2.12"
podCIDR = ["10.244.2.0/24"]
"""

# Every key that a file may have, with a plausible value; the first comments of a section say whose names they are.
EVERY_KEY = """
apiVersion = "dataplane/v1"
kind = "Node"
[node]
name = "node1"
zone = "z1"
addresses = ["192.0.2.11"]
netns = ""
hostInterface = "dp0"
labels = { "topology.kubernetes.io/rack" = "r1" }
[uplink]
interface = "eth0"
mode = "af_packet"
mtu = 1500
shared = true
[pods]
cidr = ["10.244.1.0/24"]
mtu = 1450
gateway = "169.254.1.1"
gatewayMAC = "ee:ee:ee:ee:ee:ee"
interfacePrefix = "cali"
proxyARP = true
natOutgoing = true
natPortRange = "10240-65535"
natRandomFully = true
offload = ["csum", "tso4", "tso6", "uso"]
[[pods.static]]
name = "web-0"
namespace = "default"
netns = "web-0"
ip = ["10.244.1.10"]
mac = "02:00:0a:f4:01:0a"
labels = { app = "web" }
bandwidth = { ingress = "100M", egress = "100M" }
[vxlan]
mode = "Always"
vni = 4096
port = 4789
interface = "vxlan.calico"
udpChecksum = false
[[peers]]
name = "node2"
address = "192.0.2.12"
podCIDR = ["10.244.2.0/24"]
vtepMAC = "66:00:00:00:00:02"
labels = { "topology.kubernetes.io/rack" = "r2" }
[[routes]]
dst = "198.51.100.0/24"
via = "192.0.2.1"
[services]
clusterCIDR = ["10.244.0.0/16"]
serviceCIDR = ["10.96.0.0/12"]
nodePortRange = "30000-32767"
nodePortAddresses = []
masqueradeAll = false
masqueradeBit = 14
ipvs = { scheduler = "rr", tcpTimeout = "15m", tcpFinTimeout = "2m", udpTimeout = "5m", strictARP = true }
[services.conntrack]
max = 262144
tcpEstablishedTimeout = "24h"
tcpCloseWaitTimeout = "1h"
tcpBeLiberal = true
udpTimeout = "30s"
udpStreamTimeout = "2m"
[[services.static]]
name = "web"
namespace = "default"
type = "LoadBalancer"
clusterIPs = ["10.96.0.20"]
externalIPs = ["198.51.100.20"]
loadBalancerIPs = ["192.0.2.200"]
loadBalancerIP = "192.0.2.200"
ports = [{ name = "http", protocol = "TCP", port = 80, targetPort = 8080, nodePort = 30080 }]
endpoints = [
  { ip = "10.244.1.10", weight = 1 },
  { ip = "10.244.2.10", node = "node2", zone = "z2", ready = true, serving = true, terminating = false },
  { ip = "10.244.2.11", draining = false, ports = { http = 8080 }, hostname = "web-2" },
]
labels = { app = "web" }
annotations = { "metallb.io/allow-shared-ip" = "web" }
sessionAffinity = "ClientIP"
sessionAffinityTimeout = "3h"
externalTrafficPolicy = "Local"
internalTrafficPolicy = "Cluster"
loadBalancerClass = ""
loadBalancerSourceRanges = ["203.0.113.0/24"]
healthCheckNodePort = 30180
publishNotReadyAddresses = false
scheduler = "mh"
schedulerFlags = ["mh-port", "mh-fallback"]
drainTimeout = "5m"
[[services.static]]
name = "out"
type = "ExternalName"
externalName = "www.example.net"
[[loadBalancer.ipAddressPools]]
name = "default"
addresses = ["192.0.2.200-192.0.2.220", "198.51.100.0/28"]
autoAssign = true
avoidBuggyIPs = true
[loadBalancer.ipAddressPools.serviceAllocation]
priority = 50
namespaces = ["default"]
serviceSelectors = [{ matchLabels = { app = "web" } }]
[[loadBalancer.l2Advertisements]]
name = "default"
nodeSelectors = [{ matchExpressions = [{ key = "rack", operator = "In", values = ["r1", "r2"] }] }]
preferredNodeSelectors = [{ weight = 100, preference = { matchLabels = { rack = "r1" } } }]
ipAddressPools = ["default"]
interfaces = ["eth0"]
[dns]
clusterDomain = "cluster.local"
clusterIP = "10.96.0.10"
ttl = "5s"
upstreams = ["192.0.2.53", "192.0.2.54:5353"]
pods = "insecure"
[ipam]
strictAffinity = false
maxBlocksPerHost = 20
cooldown = "0s"
reservations = ["10.244.1.128/28", "10.244.1.9"]
[[networkPolicies]]
name = "allow-web"
namespace = "default"
podSelector = { app = "web" }
policyTypes = ["Ingress"]
ingress = [{ from = [{ podSelector = { app = "client" } }], ports = [{ protocol = "TCP", port = 8080 }] }]
[state]
source = "static"
kubernetes = { kubeconfig = "" }
etcd = { endpoints = ["http://127.0.0.1:2379"], prefix = "/dataplane/v1", leaseTTL = "10s" }
[engine]
loop = "uvloop"
kernels = "numba"
batch = 256
workers = 1
busyPollUs = 0
[api]
socket = "/run/dataplane/node1.sock"
cni = true
[metrics]
listen = "127.0.0.1:9091"
[web]
listen = "127.0.0.1:8090"
[log]
level = "info"
format = "auto"
[security]
user = ""
keepCapabilities = ["CAP_NET_ADMIN", "CAP_NET_RAW"]
seccomp = true
[capture]
dir = "/var/log/dataplane"
maxSize = "100M"
"""


def errors(source: str) -> list[str]:
    """Return the errors of a file, ``line: key: text``; an empty list when it is right."""
    try:
        parse(source, "")
    except ConfigError as error:
        return [line.removeprefix(":") for line in error.errors]
    return []
