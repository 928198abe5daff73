"""How an API server is reached: from a kubeconfig, or as a pod of the cluster.

A kubeconfig is what ``kubectl`` reads (kubernetes.io/docs/concepts/configuration/organize-cluster-access-kubeconfig):
the current context names a cluster and a user. Certificates and tokens are taken from files or from the document. What
would need another program, or would silently send requests elsewhere, is refused by name: exec and auth-provider
plugins, passwords, impersonation, proxies. The file is YAML, of which JSON is a part; only YAML needs PyYAML.

A pod finds the server in its environment, its token and the certificate authority in a folder. The token is rotated, so
it is read again every minute, and at once when the server no longer takes it.
"""

import base64
import binascii
import json
import os
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dataplane.control.source import SourceError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TOKEN_SECONDS = 60.0  # client-go's: a kubelet rotates a token long before it expires
_REFUSED_USER = {
    "exec": "credential plugins are not supported; use a token, a tokenFile or a client certificate",
    "auth-provider": "auth providers are not supported; use a token, a tokenFile or a client certificate",
    "username": "passwords are not supported; use a token, a tokenFile or a client certificate",
    "password": "passwords are not supported; use a token, a tokenFile or a client certificate",
    "as": "impersonation is not supported",
    "as-uid": "impersonation is not supported",
    "as-groups": "impersonation is not supported",
    "as-user-extra": "impersonation is not supported",
}


class KubeconfigError(SourceError):
    """A kubeconfig, or a service account's folder, that cannot be used."""


@dataclass(frozen=True, slots=True)
class Access:
    """Everything that a connection to an API server needs.

    Attributes:
        server: Its URL, without a slash at the end.
        authority: PEM of the certificate authorities to trust; "" is the system's.
        verify: Whether the server's certificate is checked at all.
        server_name: The name that the certificate must have, if it is not the URL's.
        certificate: PEM of the client's certificate; "" is none.
        key: PEM of its key.
        token: A bearer token that stays; "" is none.
        token_file: A file with a token, in place of ``token``.
        namespace: Of the context or of the pod; "" when not said.
    """

    server: str
    authority: str = ""
    verify: bool = True
    server_name: str = ""
    certificate: str = ""
    key: str = ""
    token: str = ""
    token_file: Path | None = None
    namespace: str = ""

    def tls(self) -> ssl.SSLContext | None:
        """Return how the server is checked and the client shown; None for plain HTTP.

        Raises:
            KubeconfigError: A certificate or key is none.
        """
        if not self.server.startswith("https:"):
            return None
        try:
            context = ssl.create_default_context(cadata=self.authority or None)
            if not self.verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            if self.certificate:
                _load_pair(context, self.certificate, self.key)
        except (ssl.SSLError, ValueError) as error:
            raise KubeconfigError(f"{self.server}: a certificate or key cannot be read: {error}") from None
        return context


class Token:
    """The bearer token of now."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._held = access.token
        self._read_at: float | None = None

    @property
    def rotates(self) -> bool:
        """Whether reading it again may give another one."""
        return self._access.token_file is not None

    def get(self, now: float) -> str:
        """Return the token; ``now`` is in seconds of any monotonic clock. An unreadable file keeps the one before."""
        path = self._access.token_file
        if path is not None and (self._read_at is None or now - self._read_at >= TOKEN_SECONDS):
            try:
                self._held = path.read_text().strip()
                self._read_at = now
            except (OSError, UnicodeDecodeError):
                self._read_at = None
        return self._held

    def forget(self) -> None:
        """Read the file again the next time: the server has refused the token."""
        self._read_at = None


def load(kubeconfig: str) -> Access:
    """Return how to reach the server: by this file, or, when it is "", as a pod.

    Raises:
        KubeconfigError: With the file, the key and what is wrong.
    """
    return from_file(Path(kubeconfig)) if kubeconfig else in_cluster(os.environ)


def in_cluster(environment: Mapping[str, str], folder: Path = SERVICE_ACCOUNT) -> Access:
    """Return how a pod reaches its cluster's server (kubernetes.io/docs/tasks/run-application/access-api-from-pod).

    Raises:
        KubeconfigError: This is no pod.
    """
    host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise KubeconfigError("state.kubernetes.kubeconfig: missing, and this is no pod of a cluster")
    token = folder / "token"
    if not token.is_file():
        raise KubeconfigError(f"{token}: no such file, so this pod has no service account")
    namespace = folder / "namespace"
    return Access(
        server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        authority=_text(folder / "ca.crt", "the service account's certificate authority"),
        token_file=token,
        namespace=namespace.read_text().strip() if namespace.is_file() else "",
    )


def from_file(path: Path) -> Access:
    """Return how the current context of a kubeconfig reaches its server.

    Raises:
        KubeconfigError: With the file, the key and what is wrong.
    """
    config = _Document(path, _parse(path, _text(path, "the kubeconfig")))
    name = config.text(config.root, "current-context", "current-context")
    if not name:
        raise KubeconfigError(f"{path}: current-context: missing; expected the name of a context")
    context = config.named("contexts", "context", name)
    cluster_name = config.text(context, "cluster", f"contexts[{name}].cluster")
    user_name = config.text(context, "user", f"contexts[{name}].user")
    cluster = config.named("clusters", "cluster", cluster_name)
    user = config.named("users", "user", user_name) if user_name else {}
    return config.access(cluster, f"clusters[{cluster_name}]", user, f"users[{user_name}]", context)


class _Document:
    """A parsed kubeconfig, and where its relative paths begin."""

    def __init__(self, path: Path, root: Any) -> None:
        if not isinstance(root, dict):
            raise KubeconfigError(f"{path}: expected a kubeconfig")
        self.path, self.root = path, root

    def named(self, section: str, key: str, name: str) -> dict[str, Any]:
        """Return the element of a list that has this name."""
        entries = self.root.get(section) or []
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("name") == name:
                found = entry.get(key)
                return found if isinstance(found, dict) else {}
        raise KubeconfigError(f"{self.path}: {section}: none is called {name!r}")

    def text(self, table: dict[str, Any], key: str, name: str) -> str:
        """Return a string; "" when the key is missing."""
        value = table.get(key)
        if value is not None and not isinstance(value, str):
            raise KubeconfigError(f"{self.path}: {name}: expected a string (got {value!r})")
        return value or ""

    def access(
        self, cluster: dict[str, Any], cluster_at: str, user: dict[str, Any], user_at: str, context: dict[str, Any]
    ) -> Access:
        """Return what a cluster and a user say."""
        if cluster.get("proxy-url"):
            raise KubeconfigError(f"{self.path}: {cluster_at}.proxy-url: proxies are not supported")
        for key, text in _REFUSED_USER.items():
            if user.get(key):
                raise KubeconfigError(f"{self.path}: {user_at}.{key}: {text}")
        server = self.text(cluster, "server", f"{cluster_at}.server")
        if urlsplit(server).scheme not in ("http", "https") or not urlsplit(server).hostname:
            raise KubeconfigError(f"{self.path}: {cluster_at}.server: expected a URL (got {server!r})")
        token = self.text(user, "token", f"{user_at}.token")
        token_file = self.text(user, "tokenFile", f"{user_at}.tokenFile")
        if (token or token_file) and not server.startswith("https:"):
            raise KubeconfigError(f"{self.path}: {user_at}: a token is sent over https only, as kubectl does")
        certificate = self._pem(user, "client-certificate", user_at)
        key = self._pem(user, "client-key", user_at)
        if bool(certificate) != bool(key):
            raise KubeconfigError(f"{self.path}: {user_at}: expected both client-certificate and client-key")
        return Access(
            server=server.rstrip("/"),
            authority=self._pem(cluster, "certificate-authority", cluster_at),
            verify=not cluster.get("insecure-skip-tls-verify"),
            server_name=self.text(cluster, "tls-server-name", f"{cluster_at}.tls-server-name"),
            certificate=certificate,
            key=key,
            token=token,
            token_file=self.path.parent / token_file if token_file and not token else None,
            namespace=self.text(context, "namespace", "namespace"),
        )

    def _pem(self, table: dict[str, Any], key: str, at: str) -> str:
        """Return a certificate or key: in the document (``-data``, which goes first), or in a file."""
        data = self.text(table, f"{key}-data", f"{at}.{key}-data")
        if data:
            try:
                return base64.b64decode("".join(data.split()), validate=True).decode()
            except (binascii.Error, UnicodeDecodeError):
                raise KubeconfigError(f"{self.path}: {at}.{key}-data: expected PEM in base64") from None
        name = self.text(table, key, f"{at}.{key}")
        return _text(self.path.parent / name, f"{at}.{key}") if name else ""


def _parse(path: Path, text: str) -> Any:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise KubeconfigError(f"{path}: not JSON: {error}") from None
    try:
        import yaml
    except ImportError:
        text = (
            "YAML needs PyYAML (pip install 'dataplane[kubernetes]'); JSON does not (kubectl config view --raw -o json)"
        )
        raise KubeconfigError(f"{path}: {text}") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise KubeconfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise KubeconfigError(f"{path}: {what} cannot be read: {reason}") from None


def _load_pair(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Load a certificate and its key, which OpenSSL takes from a file only: one that only we can read, for a moment."""
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(f"{certificate.rstrip()}\n{key.rstrip()}\n")
        file.flush()
        context.load_cert_chain(file.name)
