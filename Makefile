# make run     set up, and be a node with three pods and a service (root)
# make test    set up (Debian packages too, as root), and run every test
# make lint    ruff and mypy
# make bench   every benchmark, beside its references

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?= examples/node.toml

# The clients and peers of the traffic tests.
TOOLS  := iproute2 iputils-ping arping traceroute tcpdump tshark iperf3 ethtool procps curl gcc libc6-dev \
          bind9-dnsutils dnsmasq-base dnsperf nftables conntrack iptables openssl etcd-server \
          podman containerd busybox-static

.PHONY: venv tools run test test-compiled test-interpreted test-bounds conformance lint bench clean

venv: $(VENV)/.installed

# The constraints are what the tests passed with, so a clean install is repeatable.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Two of them come with daemons, which Debian starts: those that were not here before are stopped again.
tools:
	@dpkg -s $(TOOLS) >/dev/null 2>&1 || { \
	fresh=$$(for unit in etcd containerd; do [ -e /lib/systemd/system/$$unit.service ] || echo $$unit; done); \
	apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(TOOLS) >/dev/null && \
	{ [ -z "$$fresh" ] || [ ! -d /run/systemd/system ] || systemctl disable --quiet --now $$fresh; }; }

run: venv
	$(BIN)/dataplane run --config $(CONFIG)

test: test-compiled test-interpreted test-bounds

# All tests, with kernels as they ship.
test-compiled: venv tools
	$(BIN)/python -m pytest

# Kernels as plain Python: every line counts for coverage. Traffic tests run the real program and ran above.
test-interpreted: venv
	NUMBA_DISABLE_JIT=1 $(BIN)/python -m coverage run -m pytest -m 'not netns'
	$(BIN)/python -m coverage report --skip-covered

# An access outside an array is an error.
test-bounds: venv
	NUMBA_BOUNDSCHECK=1 $(BIN)/python -m pytest -m 'not netns'

# The tests that other projects have, too, and the table of their results.
conformance: venv tools
	$(BIN)/python -m pytest tests/netns -m conformance --conformance docs/conformance.md

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python -m bench all

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage
