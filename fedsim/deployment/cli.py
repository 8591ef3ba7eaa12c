"""``fedsim server``, ``fedsim client`` and ``fedsim keys``."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read when gRPC is loaded; it would log every failed handshake
keys = typer.Typer(no_args_is_help=True)
ClientsDir = Annotated[Path, typer.Option("--clients-dir", help="folder of the registered clients' public keys")]
Ca = Annotated[Path, typer.Option(help="certificate of the CA that signed the server's")]


def _talk() -> None:
    """One line an event on standard error; Flower's own chatter stays out of it."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("fedsim").setLevel(logging.INFO)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)


def server(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="the TOML file of the simulation")],
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="where clients connect")],
    cert: Annotated[Path, typer.Option(help="the server's certificate")],
    key: Annotated[Path, typer.Option(help="its private key")],
    ca: Ca,
    clients_dir: ClientsDir,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help="run directory; one that exists is continued")] = None,
    set: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=V", help="override a key")] = None,
    wait: Annotated[float, typer.Option(help="seconds to wait for clients that are not there")] = 3600.0,
    round_timeout: Annotated[float, typer.Option(help="seconds a client may take for one order")] = 600.0,
    silence: Annotated[float, typer.Option(help="seconds after which a silent client counts as gone")] = 20.0,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
) -> None:
    """Run a configuration on real clients; killed and started again on the same RUN it goes on where it was."""
    from fedsim.config import load_config
    from fedsim.deployment.federation import Patience
    from fedsim.deployment.server import serve
    from fedsim.processes import keep_memory
    from fedsim.recipes import report

    _talk()
    keep_memory()
    settings = load_config(config, list(set or []))
    out = out or Path("runs") / settings.name
    patience = Patience(silence, round_timeout, wait)
    serve(settings, out, listen=listen, cert=cert, key=key, ca=ca, clients=clients_dir, patience=patience, debug=debug)
    report([out], out)


def client(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="the server, by a name its certificate holds")],
    ca: Ca,
    key: Annotated[Path, typer.Option(help="this client's private key")],
    domain: Annotated[str, typer.Option(help="which of the run's domains this client's data are")],
    data: Annotated[str, typer.Option(metavar="PATH", help="folder of the data; 'digits': the built-in suite")],
    state: Annotated[Path | None, typer.Option(metavar="DIR", help="folder of the private state")] = None,
    give_up: Annotated[float, typer.Option(help="seconds without a server after which to end")] = 86400.0,
    stay: Annotated[bool, typer.Option("--stay", help="wait for the next run after this one")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
) -> None:
    """Take part in a federation with the data of this machine, which never leave it."""
    from fedsim.deployment.client import work
    from fedsim.deployment.keys import read_key
    from fedsim.deployment.site import Site
    from fedsim.processes import keep_memory

    _talk()
    keep_memory()
    work(server, ca, read_key(key), Site(domain, data, state), give_up=give_up, stay=stay)


@keys.command()
def ca(folder: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Make a certificate authority: ca.key stays on this machine, ca.crt goes to every client."""
    from fedsim.deployment.keys import make_ca

    make_ca(folder)
    print(f"{folder / 'ca.crt'}")


@keys.command(name="server")
def server_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the folder of the CA")],
    host: Annotated[list[str], typer.Option(help="name or address by which clients reach the server; repeatable")],
    days: Annotated[float, typer.Option(help="validity")] = 365.0,
) -> None:
    """Make the server's certificate and key."""
    from fedsim.deployment.keys import make_server

    make_server(folder, host, days)
    print(f"{folder / 'server.crt'}")


@keys.command()
def node(folder: Annotated[Path, typer.Argument(metavar="DIR")], name: str) -> None:
    """Make a client's key, on the client: NAME.key stays there, NAME.pub goes to the server."""
    from fedsim.deployment.keys import make_node

    print(make_node(folder, name))


@keys.command()
def register(
    public: Annotated[Path, typer.Argument(metavar="NAME.pub")],
    clients_dir: ClientsDir,
    name: Annotated[str, typer.Option(help="another name for it")] = "",
) -> None:
    """Let a client take part."""
    from fedsim.deployment.keys import register

    print(register(public, clients_dir, name))


@keys.command()
def revoke(name: str, clients_dir: ClientsDir) -> None:
    """Shut a client out, at once if the server is running."""
    from fedsim.deployment.keys import revoke

    revoke(name, clients_dir)
    print(f"{name}: no longer registered")
