"""`fedmira federation ...`: a real federation, a server and sites in separate places.

As in main.py, a command imports what it needs when it runs, and annotations are evaluated when this file is read.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmira.cli.ending import course
from fedmira.cli.options import AsJson, Debug, Overrides, Quiet
from fedmira.cli.show import visible
from fedmira.errors import ConfigError

if TYPE_CHECKING:
    from fedmira.deploy.invite import Invitation, Signed

federation = typer.Typer(no_args_is_help=True, help="Train over a network: a server, and sites that keep their data.")


@federation.callback()
def group() -> None:
    """Train over a network: a server, and sites that keep their data."""


@federation.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the federation's folder at its server")],
    overrides: Overrides = None,
    config: Annotated[str | None, typer.Option(help="the study: a YAML file")] = None,
    server: Annotated[str | None, typer.Option(metavar="HOST[:PORT]", help="where sites reach the server")] = None,
    sites: Annotated[str | None, typer.Option(metavar="A,B,...", help="names of the sites, two or more")] = None,
    name: Annotated[str | None, typer.Option(help="of the federation; default: the folder's")] = None,
    own_keys: Annotated[bool, typer.Option("--own-keys", help="sites make their private keys themselves")] = False,
    deadline: Annotated[float | None, typer.Option(help="seconds until a round closes; default: 3600")] = None,
    quorum: Annotated[float | None, typer.Option(help="share of sites that must answer; default: 0.5")] = None,
    tls: Annotated[str | None, typer.Option(help="mutual (default) | off-and-i-know-it")] = None,
    add: Annotated[str | None, typer.Option("--add-site", metavar="NAME", help="add a site to a federation")] = None,
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="FILE", help="sign a site's request, NAME.request.zip")
    ] = None,
    renew: Annotated[bool, typer.Option("--renew", help="give the server new keys and certificates")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make a federation: keys, certificates, settings, and a folder to send to each site, with a page of what to do."""
    founding = {"--config": config, "--server": server, "--sites": sites}
    others = {**founding, "--name": name, "--deadline": deadline, "--quorum": quorum, "--tls": tls}
    needless = [option for option, value in others.items() if value is not None]
    changes = (add is not None, sign is not None, renew)
    if any(changes):
        if overrides or needless or sum(changes) > 1 or (add is None and own_keys):
            raise ConfigError(
                ["--add-site (with --own-keys or not), --sign and --renew change a federation: give one of them alone"],
                "federation",
            )
        from fedmira.deploy import invite

        if renew:
            print(visible(f"the server's new certificate is in {invite.renew(folder)}; start the server again"))
        elif sign is not None:
            _show_signed(invite.sign(folder, sign), as_json)
        elif add is not None:
            _show(invite.add_site(folder, add, own_keys=own_keys), as_json, added=True)
        return
    if config is None or server is None or sites is None:
        missing = ", ".join(option for option, value in founding.items() if value is None)
        raise ConfigError([f"missing: {missing}; a federation needs {', '.join(founding)}"], "federation")
    from fedmira.deploy import invite
    from fedmira.study.loading import load_config

    invite.check_free(folder)
    names = [site.strip() for site in sites.split(",")]
    settings = invite.describe_federation(
        folder, server=server, sites=names, name=name, deadline=deadline, quorum=quorum, tls=tls
    )
    unused = ["output_dir=server/study", "data.path=AT-EACH-SITE"]  # the organiser need not give them
    checked = load_config(config, [*(overrides or []), *unused])
    if settings.tls != "mutual":
        print("warning: without TLS whoever is between a site and the server reads and changes all", file=sys.stderr)
    print(visible(f"loading {checked.model.base_model} to describe it to the sites"), file=sys.stderr)
    _show(invite.found(folder, checked, settings, own_keys=own_keys), as_json)


@federation.command()
def server(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the federation's folder")],
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Carry out the study with the sites, from where it is; it runs until the study is complete."""
    from fedmira.cli.main import show_study
    from fedmira.cli.progress import Watch
    from fedmira.deploy.folders import open_server
    from fedmira.deploy.serving import run_server

    opened = open_server(folder)
    course.again = ["fedmira", "federation", "server", str(folder)]
    with Watch(quiet) as watch:
        study = run_server(opened, tell=_tell, observer=watch)
    show_study(study, as_json=False)


@federation.command()
def site(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the site's folder, as the organiser sent it")],
    check: Annotated[bool, typer.Option("--check", help="read the settings and the data; send nothing")] = False,
    show_example: Annotated[
        bool, typer.Option("--show-example", help="print one example as the model gets it; send nothing")
    ] = False,
    request: Annotated[
        bool, typer.Option("--request", help="make this site's key, and a request to be signed")
    ] = False,
    signed: Annotated[
        Path | None, typer.Option("--accept", metavar="FILE", help="take the signed request, NAME.signed.zip")
    ] = None,
    fingerprint: Annotated[
        str | None, typer.Option(metavar="SHA256:...", help="of the root certificate, told by another channel")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Take part with this site's data until the study is complete; started again, it continues where it was."""
    chosen = [name for name, value in (("--check", check), ("--show-example", show_example), ("--request", request),
                                       ("--accept", signed is not None)) if value]  # fmt: skip
    if len(chosen) > 1 or (signed is None) != (fingerprint is None):
        raise ConfigError(
            ["give one of --check, --show-example, --request, and --accept with --fingerprint"], "federation"
        )
    from fedmira.deploy.folders import open_site_folder

    opened = open_site_folder(folder)
    if request:
        from hashlib import sha256

        from fedmira.deploy.invite import make_request

        made = make_request(opened.path)
        print(visible(f"send to the server's organiser: {made}"))
        print(f"tell by another channel: sha256 of that file {sha256(made.read_bytes()).hexdigest()}")
        return
    if signed is not None and fingerprint is not None:
        from fedmira.deploy.invite import accept

        print(visible(f"this site's certificate is in {accept(opened.path, signed, fingerprint)}"))
        check_command = f"fedmira federation site {shlex.quote(str(folder))} --check"
        print(visible(f"next: fill in {opened.settings}, then: {check_command}"))
        return
    if check:
        from fedmira.deploy.checking import check_site

        facts = check_site(opened)
        print(json.dumps(facts) if as_json else visible("\n".join(f"{name}: {value}" for name, value in facts.items())))
        return
    if show_example:
        from fedmira.cli.show import show_examples
        from fedmira.deploy.checking import example_of

        show_examples(example_of(opened), as_json)
        return
    from fedmira.deploy.serving import run_site

    course.again = ["fedmira", "federation", "site", str(folder)]
    run_site(opened, tell=_tell)


@federation.command()
def status(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the folder of the federation, or of a site")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say how far a federation has come, from its folder: the server's, or a site's."""
    from fedmira.deploy.status import describe

    facts = describe(folder)
    print(json.dumps(facts) if as_json else visible("\n".join(f"{name}: {value}" for name, value in facts.items())))


@federation.command()
def audit(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the folder of the federation, or of a site")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List what left this place: when, to whom, for what, how many bytes, and the sha256 of them."""
    from fedmira.deploy.audit import read_audit
    from fedmira.deploy.folders import open_folder

    lines = list(read_audit(open_folder(folder).audit))
    for line in lines:
        print(json.dumps(line) if as_json else visible("  ".join(str(value) for value in line.values())))
    if not as_json:
        print(f"{len(lines)} messages, {sum(line['bytes'] for line in lines)} bytes", file=sys.stderr)


def _tell(line: str) -> None:
    print(visible(line), file=sys.stderr, flush=True)


def _show(made: "Invitation", as_json: bool, *, added: bool = False) -> None:
    """Print what was made, and what to send to whom."""
    address = f"{made.settings.server.host}:{made.settings.server.port}"
    if as_json:
        facts = {
            "folder": str(made.folder),
            "name": made.settings.name,
            "server": address,
            "sites": {site: str(path) for site, path in made.sites.items()},
            "own_keys": made.own_keys,
            "fingerprint": made.fingerprint,
            "notes": list(made.notes),
        }
        print(json.dumps(facts, ensure_ascii=False))
        return
    for note in made.notes:
        print(visible(f"note: {note}"), file=sys.stderr)
    channel = "holds no secret" if made.own_keys else "has its private key: by a private channel"
    print(visible(f"federation {made.settings.name}: server {address}"))
    for site, path in made.sites.items():
        print(visible(f"send to {site}: {path}   ({channel})"))
    print(f"tell by another channel: root certificate {made.fingerprint}")
    print(visible(f"back up: {made.folder / 'ca'} and {made.folder / 'server'}"))
    print(visible(f"what to do, in order: {made.folder / 'README.md'}"))
    if made.own_keys:
        print(visible(f"next: fedmira federation init {shlex.quote(str(made.folder))} --sign NAME.request.zip"))
    elif added:
        print("next: nothing here; a server that runs takes it in after the round in which it connects")
    else:
        print(visible(f"next: fedmira federation server {shlex.quote(str(made.folder))}"))


def _show_signed(signed: "Signed", as_json: bool) -> None:
    """Print what to send back, and what to compare."""
    if as_json:
        facts = {"site": signed.site, "signed": str(signed.path), "sha256": signed.digest}
        print(json.dumps({**facts, "fingerprint": signed.fingerprint}))
        return
    print(visible(f"signed for {signed.site}: send back {signed.path}"))
    print(f"sha256 of its request: {signed.digest}\nask the site by another channel; if it differs, do not send")
    print(f"tell by another channel: root certificate {signed.fingerprint}")
