"""Kubeconfigs in all their forms, and a pod's service account."""

import base64
import json
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dataplane.control.kube_config import TOKEN_SECONDS, Access, KubeconfigError, Token, from_file, in_cluster


def config(cluster, user, **more):
    context = {"cluster": "c", "user": "u"} | more.pop("context", {})
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "contexts": [{"name": "other", "context": {"cluster": "no"}}, {"name": "x", "context": context}],
        "clusters": [{"name": "c", "cluster": {"server": "https://192.0.2.5:6443"} | cluster}],
        "users": [{"name": "u", "user": user}],
    } | more


def read(tmp_path: Path, document: object) -> Access:
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(document))
    return from_file(path)


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1 and its key, in a folder."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


def test_the_current_context_names_cluster_user_and_namespace(tmp_path):
    access = read(tmp_path, config({}, {"token": "t0"}, context={"namespace": "net"}))
    assert access == Access("https://192.0.2.5:6443", token="t0", namespace="net")


def test_a_kubeconfig_in_json_needs_no_yaml(tmp_path):
    path = tmp_path / "config"
    path.write_text(json.dumps(config({}, {"token": "t0"})))
    program = "\n".join(
        (
            "import sys; sys.modules['yaml'] = None",
            "from dataplane.control.kube_config import load",
            f"print(load({str(path)!r}).token)",
        )
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "t0\n"
    path.write_text(yaml.safe_dump(config({}, {"token": "t0"})))
    failed = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=False)
    assert "YAML needs PyYAML" in failed.stderr


def test_certificates_come_from_files_beside_the_kubeconfig_or_from_the_document(tmp_path, pair):
    (tmp_path / "ca.pem").write_text((pair / "cert.pem").read_text())
    files = read(
        tmp_path,
        config(
            {"certificate-authority": "ca.pem"},
            {"client-certificate": str(pair / "cert.pem"), "client-key": str(pair / "key.pem")},
        ),
    )
    cert, key = (pair / "cert.pem").read_text(), (pair / "key.pem").read_text()
    data = read(
        tmp_path,
        config(
            {"certificate-authority-data": encoded(cert), "certificate-authority": "nowhere"},
            {"client-certificate-data": encoded(cert), "client-key-data": encoded(key)},
        ),
    )
    assert files == data
    context = data.tls()
    assert context is not None
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert len(context.get_ca_certs()) == 1  # ours alone, and not the system's


def test_an_unverified_server_is_what_the_file_asks_for(tmp_path):
    context = read(tmp_path, config({"insecure-skip-tls-verify": True}, {})).tls()
    assert context is not None
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_NONE, False)
    assert read(tmp_path, config({"server": "http://192.0.2.5:8080/"}, {})).tls() is None
    assert read(tmp_path, config({"tls-server-name": "kubernetes"}, {})).server_name == "kubernetes"


REFUSED = {
    "exec": (config({}, {"exec": {"command": "aws"}}), "users[u].exec: credential plugins are not supported"),
    "auth-provider": (config({}, {"auth-provider": {"name": "gcp"}}), "users[u].auth-provider: auth providers"),
    "password": (config({}, {"username": "a", "password": "b"}), "users[u].username: passwords are not supported"),
    "as": (config({}, {"token": "t", "as": "admin"}), "users[u].as: impersonation is not supported"),
    "proxy": (config({"proxy-url": "http://proxy"}, {}), "clusters[c].proxy-url: proxies are not supported"),
    "no context": (config({}, {}, **{"current-context": ""}), "current-context: missing"),
    "no such context": (config({}, {}, **{"current-context": "y"}), "contexts: none is called 'y'"),
    "no such user": (config({}, {}, context={"user": "v"}), "users: none is called 'v'"),
    "no url": (config({"server": "192.0.2.5"}, {}), "clusters[c].server: expected a URL (got '192.0.2.5')"),
    "half a pair": (config({}, {"client-key-data": encoded("k")}), "expected both client-certificate and client-key"),
    "not base64": (
        config({"certificate-authority-data": "?"}, {}),
        "certificate-authority-data: expected PEM in base64",
    ),
    "token in clear": (
        config({"server": "http://192.0.2.5"}, {"token": "t"}),
        "users[u]: a token is sent over https only",
    ),
    "no file": (config({"certificate-authority": "no.pem"}, {}), "certificate-authority cannot be read: No such file"),
    "a list": ([1], "expected a kubeconfig"),
    "a number": (config({}, {"token": 7}), "users[u].token: expected a string (got 7)"),
}


@pytest.mark.parametrize(("document", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_used_is_refused_with_its_key(tmp_path, document, text):
    with pytest.raises(KubeconfigError) as caught:
        read(tmp_path, document)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "{", "\0"])
def test_broken_files_are_errors_of_one_line(tmp_path, text):
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(KubeconfigError, match="config"):
        from_file(path)
    with pytest.raises(KubeconfigError, match="cannot be read: No such file"):
        from_file(tmp_path / "missing")


def test_a_certificate_that_is_none_is_an_error(tmp_path):
    pem = encoded("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    access = read(tmp_path, config({"certificate-authority-data": pem}, {}))
    with pytest.raises(KubeconfigError, match="a certificate or key cannot be read"):
        access.tls()


def test_a_pod_finds_its_server_in_the_environment(tmp_path, pair):
    (tmp_path / "token").write_text("t1\n")
    (tmp_path / "ca.crt").write_text((pair / "cert.pem").read_text())
    (tmp_path / "namespace").write_text("kube-system")
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    access = in_cluster(environment, tmp_path)
    assert (access.server, access.namespace) == ("https://[fd00::1]:443", "kube-system")
    assert Token(access).get(0) == "t1"
    with pytest.raises(KubeconfigError, match="this is no pod of a cluster"):
        in_cluster({}, tmp_path)
    with pytest.raises(KubeconfigError, match="no service account"):
        in_cluster(environment, tmp_path / "missing")


def test_a_token_file_is_read_again_after_a_minute_and_when_the_server_refuses_it(tmp_path):
    (tmp_path / "token").write_text("t1")
    token = Token(read(tmp_path, config({}, {"tokenFile": "token"})))
    assert token.rotates
    assert token.get(100) == "t1"
    (tmp_path / "token").write_text("t2")
    assert token.get(100 + TOKEN_SECONDS - 1) == "t1"
    assert token.get(100 + TOKEN_SECONDS) == "t2"
    (tmp_path / "token").write_text("t3")
    token.forget()
    assert token.get(101 + TOKEN_SECONDS) == "t3"
    (tmp_path / "token").unlink()
    token.forget()
    assert token.get(102 + TOKEN_SECONDS) == "t3"  # the file is being replaced: better an old token than none
