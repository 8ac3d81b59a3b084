"""What a front door needs before it may listen to a network: a certificate with its private key, and a key for callers.

    python -m marten.credentials FOLDER          makes what is missing there, and says what it made

A folder holds `tls.crt` and `tls.key` (PEM), `key` (what callers send as `Authorization: Bearer`), and `keys.yaml`, the
same for Envoy, which may be given further keys by hand, or others instead. Whatever is there is taken as it is.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from marten.errors import ServerError

_VALID_DAYS = 397  # browsers refuse more
_KEY_BYTES = 32
_KEYS = """\
# Who may ask. Envoy reads this file again whenever another is moved into its place:
#   cp keys.yaml new.yaml; edit new.yaml; mv new.yaml keys.yaml
version_info: "0"
resources:
  - "@type": type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig
    name: envoy.filters.http.rbac
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC
      rules:
        policies:
          holders-of-a-key:
            permissions: [{any: true}]
            principals:
"""


@dataclass(frozen=True)
class Credentials:
    """Files of one folder, all of them there."""

    certificate: Path
    private_key: Path
    key_file: Path
    keys: Path

    @property
    def key(self) -> str:
        """What a caller sends."""
        return self.key_file.read_text(encoding="ascii").strip()


def open_or_make(folder: Path, names: Sequence[str] = ()) -> tuple[Credentials, list[Path]]:
    """Take the credentials of a folder, and make those that are missing.

    Args:
        folder: made where it is missing, for nobody else to read.
        names: host names and addresses for a new certificate, besides this machine's own.

    Returns:
        The credentials, and the files that were made.

    Raises:
        ServerError: a certificate without its private key or the other way round, or no package to make one.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = Credentials(folder / "tls.crt", folder / "tls.key", folder / "key", folder / "keys.yaml")
    made: list[Path] = []
    if found.certificate.exists() != found.private_key.exists():
        lone = found.certificate if found.certificate.exists() else found.private_key
        raise ServerError(f"{lone} stands alone: give {folder} both tls.crt and tls.key, or neither to have them made")
    if not found.certificate.exists():
        certificate, private_key = _self_signed([*names, *_own_names()])
        _write(found.private_key, private_key)
        _write(found.certificate, certificate)
        made += [found.certificate, found.private_key]
    if not found.keys.exists():
        if not found.key_file.exists():
            _write(found.key_file, f"{secrets.token_urlsafe(_KEY_BYTES)}\n".encode())
            made.append(found.key_file)
        _write(found.keys, keys_text([found.key]).encode())
        made.append(found.keys)
    return found, made


def keys_text(keys: Sequence[str]) -> str:
    """Envoy's rule for callers: one of some keys; none at all lets everybody in.

    Raises:
        ServerError: a key that could end the header or the file it stands in.
    """
    odd = [key for key in keys if not key or not all(c.isascii() and (c.isalnum() or c in "-._~+/=") for c in key)]
    if odd:
        raise ServerError("a key is made of letters, digits and -._~+/= alone (RFC 6750); found another sign in one")
    if not keys:
        return _KEYS + "              - any: true\n"
    line = "              - header: {{name: authorization, string_match: {{exact: Bearer {}}}}}\n"
    return _KEYS + "".join(line.format(key) for key in keys)


def _own_names() -> list[str]:
    """What this machine may be called: localhost, its names, its addresses."""
    host = socket.gethostname()
    names = ["localhost", "127.0.0.1", "::1", host, socket.getfqdn()]
    with contextlib.suppress(OSError):  # a name that nothing resolves
        names += [str(info[4][0]) for info in socket.getaddrinfo(host, None)]
    return names


def _self_signed(names: Sequence[str]) -> tuple[bytes, bytes]:
    """A certificate for some names, signed by itself, and its private key; both PEM."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise ServerError(
            "making a certificate needs the package cryptography: pip install -r requirements-frontdoor.txt"
        ) from None
    private_key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Marten")])
    alternatives: list[x509.GeneralName] = []
    for name in dict.fromkeys(names):
        try:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            alternatives.append(x509.DNSName(name))
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(private_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    return certificate.public_bytes(pem), private_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)


def _write(path: Path, data: bytes) -> None:
    """Make a file that was not there, for its owner alone."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


if __name__ == "__main__":
    for file in open_or_make(Path(sys.argv[1]), sys.argv[2:])[1]:
        print(f"made {file}")
