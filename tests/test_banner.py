"""What the terminal suggests works with what the file has."""

from dataclasses import replace

from dataplane import config
from dataplane.control.banner import suggestions

STATE = config.load().state


def test_the_built_in_node_suggests_a_page_through_its_service():
    lines = "\n".join(suggestions(STATE.pods, STATE.services))
    assert "ip netns exec client-0 ping -c 3 10.244.1.10" in lines
    assert "ip netns exec web-0 iperf3 -s -1 &\nip netns exec client-0 iperf3 -c 10.244.1.10" in lines
    assert "for pod in web-0 web-1; do ip netns exec $pod python3 -m http.server 8080 & done" in lines
    assert "ip netns exec client-0 curl -sS --retry 5 --retry-connrefused http://10.96.0.20:80" in lines


def test_nothing_is_suggested_that_cannot_work():
    (service,) = STATE.services
    assert "curl" not in "\n".join(suggestions(STATE.pods))
    assert "curl" not in "\n".join(suggestions(STATE.pods, (replace(service, endpoints=()),)))
    assert "ping" not in "\n".join(suggestions(STATE.pods[:1]))
