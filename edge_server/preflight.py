"""What is checked before bundles load, which may take minutes: address, certificates, tokens, cores, device, files."""

from __future__ import annotations

import os
import socket
import ssl
import stat
from pathlib import Path

from edge_server.access.auth import open_tokens
from edge_server.config import SecurityConfig, ServerConfig, split_address
from edge_server.files import read_small
from edge_server.machine import check_cpus, check_device, check_threads
from protos.errors import ConfigError

_MAX_PEM_BYTES = 1 << 20
_IN_USE = "the address is in use or not one of this machine's"


def check(config: ServerConfig) -> None:
    """Tries everything that the configuration names outside of the bundles.

    Raises:
        ConfigError: something cannot be used; the message says which, and why.
    """
    check_address(config)
    check_certificates(config.security)
    open_tokens(config.security)
    if config.models_dir is not None and not config.models_dir.is_dir():
        raise ConfigError(f"--models-dir {config.models_dir} is no directory")
    if config.port_file is not None:
        _check_port_file(config.port_file)
    if config.backend == "embedded":
        check_cpus(config.tail.cpus)
        check_threads(config.tail.threads)
        check_device(config.tail.device)


def check_address(config: ServerConfig) -> None:
    """Binds the address for a moment, as gRPC will.

    Raises:
        ConfigError: it is taken, no address of this machine, or a port that only root may use.
    """
    host, port = split_address(config.listen)
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.listen}: {error.strerror}") from error
    family, kind, protocol, _, address = found[0]
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if config.reuse_port:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            probe.bind(address)
            if not config.reuse_port:
                probe.listen(1)  # two that only bind may share an address; among those that listen the second one fails
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.listen}: {error.strerror}; {_IN_USE}") from error


def check_certificates(security: SecurityConfig) -> None:
    """Reads certificate, key and authority as TLS will.

    Raises:
        ConfigError: one cannot be read, is no PEM, or the key is not the certificate's.
    """
    if security.tls_cert is None or security.tls_key is None:
        return
    for path in (security.tls_cert, security.tls_key, security.tls_client_ca):
        if path is not None:
            read_pem(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pair = f"--tls-cert {security.tls_cert} and --tls-key {security.tls_key}"
    try:
        context.load_cert_chain(security.tls_cert, security.tls_key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{pair} do not match: the key is not this certificate's") from error
        raise ConfigError(f"{pair} cannot be used: {error.reason or error}") from error
    except OSError as error:
        raise ConfigError(f"{pair} cannot be read: {error.strerror}") from error
    if security.tls_client_ca is not None:
        try:
            context.load_verify_locations(security.tls_client_ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"--tls-client-ca {security.tls_client_ca} cannot be used: {error}") from error


def _no_password() -> str:
    raise ConfigError("the key of --tls-key is protected by a password; this server needs one without")


def read_pem(path: Path) -> bytes:
    """A PEM file's bytes.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    data = read_small(path, "file", most_bytes=_MAX_PEM_BYTES)
    if b"-----BEGIN " not in data:
        raise ConfigError(f"{path} is no PEM file")
    return data


def _check_port_file(path: Path) -> None:
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ConfigError(f"cannot write the port file {path}: it is there already, and is no file")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write the port file {path}: its directory does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"cannot write the port file {path}: its directory is not writable")
