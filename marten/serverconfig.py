"""What to serve and where: archives by name, TorchServe's properties, addresses and the flags that change them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marten.errors import ServerError, UsageError
from marten.files import MODEL_STORE, ROOT
from marten.fitting import available_cores, available_memory, fit_threads, fit_workers, has_gpu
from marten.manifest import check_digest
from marten.readiness import Address

CONFIG = ROOT / "deployment" / "config.properties"
INTERFACES = {"inference": 8080, "management": 8081, "metrics": 8082}
"""TorchServe's HTTP interfaces and their usual ports."""


@dataclass(frozen=True)
class Settings:
    """What to serve and where.

    Attributes:
        models: file in the store by endpoint name.
        store: folder of the archives.
        config: TorchServe's properties as text, overrides included.
        addresses: by interface: "inference", "management", "metrics".
        workers: processes for each model; None leaves it to the archive, and where that says nothing to the cores.
        threads: of each worker.
    """

    models: Mapping[str, str]
    store: Path
    config: str
    addresses: Mapping[str, Address]
    workers: int | None = None
    threads: int = 1

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a running server to be the one that is asked for; archives by size and time."""
        stats = {name: (self.store / file).stat() for name, file in self.models.items()}
        archives = {name: [str(self.store / self.models[name]), s.st_size, s.st_mtime_ns] for name, s in stats.items()}
        return {"archives": archives, "config": self.config, "workers": self.workers}


_FEW_CORES = 4
_MODEST_JAVA = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
"""Java's second compiler and its parallel garbage collector take cores from workers for the first minute of load."""


def read_settings(
    models: Sequence[str] = (),
    store: Path = MODEL_STORE,
    config: Path = CONFIG,
    ports: Mapping[str, int | None] | None = None,
    workers: int | None = None,
    number_of_gpu: int | None = None,
) -> Settings:
    """Put together what `serve` was asked for.

    Args:
        models: "vgg" for vgg.mar, or "name=file.mar"; none means every archive in the store.
        store: folder of the archives.
        config: TorchServe's properties.
        ports: by interface; a port of None follows the inference port where that is given, else the config's.
        workers: processes for each model; None fits them to cores and memory, and leaves them alone on a GPU.
        number_of_gpu: how many GPUs to use at most; None for all there are.

    Raises:
        ServerError: no such store, archive or config, or an archive that cannot be read.
        UsageError: a config that cannot be asked without a token or over plain HTTP.
    """
    properties = read_properties(config)
    if properties.get("disable_token_authorization", "false").lower() != "true":
        raise UsageError(f"{config} keeps TorchServe's tokens on, and scripts/serve asks its models without one")
    addresses = read_addresses(config, ports or {})
    found = find_archives(models, store)
    on_gpu = has_gpu() and number_of_gpu != 0
    fitted = workers
    if fitted is None and not on_gpu:
        fitted = fit_workers(len(found), available_cores(), available_memory())
    overrides = [f"{name}_address=http://{bound_host(properties, name)}:{a.port}" for name, a in addresses.items()]
    if fitted is not None:
        overrides.append(f"default_workers_per_model={fitted}")
    if number_of_gpu is not None:
        overrides.append(f"number_of_gpu={number_of_gpu}")
    java = properties.get("vmargs", "")
    if not on_gpu and available_cores() <= _FEW_CORES and "GC" not in java:  # a garbage collector of your own choice
        overrides.append(f"vmargs={' '.join((java, *_MODEST_JAVA)).strip()}")
    text = config.read_text(encoding="utf-8") + "\n# from the command line\n" + "\n".join(overrides) + "\n"
    threads = fit_threads(len(found) * (fitted or 1), available_cores())
    return Settings(found, store.resolve(), text, addresses, workers, threads)


def read_properties(path: Path) -> dict[str, str]:
    """Read key=value lines; the last one of a key wins, as it does for TorchServe.

    Raises:
        ServerError: no such file.
    """
    try:
        return parse_properties(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ServerError(f"no TorchServe config at {path}: {error.strerror}") from error


def parse_properties(text: str) -> dict[str, str]:
    """Key and value of each line of a properties file; the last one of a key wins."""
    lines = text.splitlines()
    pairs = (line.strip().split("=", 1) for line in lines if "=" in line and not line.lstrip().startswith(("#", "!")))
    return {key.strip(): value.strip() for key, value in pairs}


def find_archives(models: Sequence[str], store: Path) -> dict[str, str]:
    """File by endpoint name, each looked into.

    Raises:
        ServerError: the store holds no archive, lacks a named one, or holds one that is no .mar.
        ArchiveError: one is not what the manifest beside it says.
    """
    present = sorted(p.name for p in store.glob("*.mar") if not p.name.startswith("."))
    if not present:
        raise ServerError(f"no .mar in {store}: build one with scripts/archive")
    pairs = [word.partition("=") for word in models] or [(name.removesuffix(".mar"), "", "") for name in present]
    found = {name.removesuffix(".mar"): file or f"{name.removesuffix('.mar')}.mar" for name, _, file in pairs}
    for name, file in found.items():
        if file not in present:
            raise ServerError(f"{name}: no {file} in {store}; there are {', '.join(present)}")
        try:
            with zipfile.ZipFile(store / file) as archive:
                archive.getinfo("MAR-INF/MANIFEST.json")
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            raise ServerError(
                f"{name}: {store / file} is no readable .mar ({error}): build it anew with scripts/archive"
            ) from error
        check_digest(store / file)
    return found


def read_addresses(config: Path, ports: Mapping[str, int | None]) -> dict[str, Address]:
    """Address by interface: a port given, else the inference port's neighbour where that is given, else the config's.

    Raises:
        UsageError: an address that is not plain HTTP, or a port used twice.
    """
    properties = read_properties(config)
    found = {}
    base = ports.get("inference")
    for offset, (name, default) in enumerate(INTERFACES.items()):
        given = properties.get(f"{name}_address", f"http://127.0.0.1:{default}")
        scheme, _, rest = given.partition("://")
        host, _, port = rest.rstrip("/").rpartition(":")
        if scheme != "http" or not port.isdigit():
            raise UsageError(
                f"{config}: {name}_address={given} must read http://HOST:PORT; encrypt in a proxy in front"
            )
        chosen = ports.get(name) or (base + offset if base else int(port))
        found[name] = Address("127.0.0.1" if host == "0.0.0.0" else host, chosen)
    if len({address.port for address in found.values()}) < len(found):
        raise UsageError(f"ports repeat: {', '.join(f'{name} {a.port}' for name, a in found.items())}")
    return found


def bound_host(properties: Mapping[str, str], name: str) -> str:
    """The host that TorchServe listens on for one of its interfaces, as its address names it."""
    return properties.get(f"{name}_address", "http://127.0.0.1:0").partition("://")[2].rpartition(":")[0]
