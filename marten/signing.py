"""Signatures of manifests, made and checked by ssh-keygen: the keys that people have and publish already.

A manifest holds the sha256 of its archive, so who signs one vouches for the other. `allowed_signers` is a file of
lines "ada@example.org ssh-ed25519 AAAA…", as git and ssh-keygen read it.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from marten.errors import ArchiveError, UsageError
from marten.manifest import manifest_path, signature_path

_NAMESPACE = "marten-archive"
"""What a signature is for: one that was made for a mail or a commit does not count for an archive."""


def sign(mar: Path, key: Path) -> Path:
    """Sign the manifest of an archive.

    Args:
        mar: the archive, its manifest beside it.
        key: a private key, or the public half of one that ssh-agent holds.

    Raises:
        UsageError: no such key, or one that ssh-keygen cannot use.
    """
    if not key.is_file():
        raise UsageError(f"no key at {key}: make one with ssh-keygen -t ed25519 -f {key}")
    signature_path(mar).unlink(missing_ok=True)  # ssh-keygen would ask whether to overwrite it
    done = _ssh_keygen("-Y", "sign", "-q", "-f", str(key), "-n", _NAMESPACE, str(manifest_path(mar)))
    if done.returncode != 0:
        raise UsageError(f"ssh-keygen cannot sign with {key}: {_reason(done)}")
    return signature_path(mar)


def check_signature(mar: Path, signers: Path) -> str:
    """Say who signed an archive's manifest.

    Args:
        mar: the archive, manifest and signature beside it.
        signers: the allowed signers.

    Returns:
        The signer's name, as the file of allowed signers gives it.

    Raises:
        ArchiveError: not signed, signed by another, or changed since.
        UsageError: no such file of signers.
    """
    if not signers.is_file():
        raise UsageError(f"no allowed signers at {signers}: lines of NAME KEYTYPE KEY, one for each who may sign")
    signature = signature_path(mar)
    if not signature.is_file():
        raise ArchiveError(f"{mar} is not signed: there is no {signature.name} beside it; scripts/archive --sign KEY")
    found = _ssh_keygen("-Y", "find-principals", "-s", str(signature), "-f", str(signers))
    who = (found.stdout.strip().splitlines() or [""])[0]
    if found.returncode != 0 or not who:
        raise ArchiveError(f"{signature} was made by none of {signers}")
    words = ("-Y", "verify", "-f", str(signers), "-I", who, "-n", _NAMESPACE, "-s", str(signature))
    done = _ssh_keygen(*words, given=manifest_path(mar).read_bytes())
    if done.returncode != 0:
        raise ArchiveError(f"{manifest_path(mar)} is not what {who} signed: {_reason(done)}")
    return who


def _ssh_keygen(*words: str, given: bytes = b"") -> subprocess.CompletedProcess[str]:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise UsageError("ssh-keygen is not here: apt-get install openssh-client")
    done = subprocess.run([program, *words], input=given, capture_output=True, timeout=60, check=False)
    text = (done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))
    return subprocess.CompletedProcess(done.args, done.returncode, *text)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
