"""Commands after an audit: `report`, `compare`, `card`, `sign`, `verify`."""

import argparse
import os
from pathlib import Path


def add_publishing(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What comes after an audit: showing it, and letting it travel with the release."""
    report = commands.add_parser(
        "report", help="show a report again, or write it in another format"
    )
    report.add_argument("report", type=Path, help="report.json")
    report.add_argument(
        "--out", type=Path, help=".html, .md, .csv, .svg or .png; default: print it"
    )
    report.add_argument(
        "--figure", default="summary", help="which figure for .svg and .png, default summary"
    )
    report.set_defaults(run=_report)

    compare = commands.add_parser("compare", help="several reports side by side")
    compare.add_argument(
        "reports", type=Path, nargs="+", metavar="reports", help="report.json files"
    )
    compare.add_argument("--out", type=Path, help="page to write, .html")
    compare.set_defaults(run=_compare)

    card = commands.add_parser("card", help="put what an audit found into a release's model card")
    card.add_argument("release", type=Path, help="release folder")
    card.add_argument("report", type=Path, help="report.json of these weights")
    card.set_defaults(run=_card)

    sign = commands.add_parser(
        "sign", help="list the digests of a release, and sign them with a key"
    )
    sign.add_argument("release", type=Path, help="release folder; sign it last")
    sign.add_argument("--key", type=Path, help="EC private key, PEM; without it nothing is signed")
    sign.set_defaults(run=_sign)

    verify = commands.add_parser("verify", help="whether a release is as published and as audited")
    verify.add_argument("release", type=Path, help="release folder")
    verify.add_argument("--key", type=Path, help="the publisher's public key, PEM")
    verify.add_argument("--report", type=Path, help="report.json that should be of these weights")
    verify.set_defaults(run=_verify)


def _report(chosen: argparse.Namespace) -> None:
    from trap2.reporting import export, text
    from trap2.schema import Report

    report = Report.load(chosen.report)
    if chosen.out is None:
        print(text.render(report))
        return
    export.export(report, chosen.out, chosen.figure)
    print(f"written: {chosen.out}")


def _compare(chosen: argparse.Namespace) -> None:
    from trap2.reporting import comparison, text
    from trap2.schema import Report

    shared = os.path.commonpath([path.absolute().parent for path in chosen.reports])
    reports = [(os.path.relpath(path, shared), Report.load(path)) for path in chosen.reports]
    if chosen.out is not None:
        from trap2.reporting import html

        html.save_comparison(reports, chosen.out)
    print(text.aligned(comparison.leaderboard(reports), width=120))


def _card(chosen: argparse.Namespace) -> None:
    from trap2.reporting.model_card import embed
    from trap2.schema import Report

    embed(Report.load(chosen.report), chosen.release)
    print(f"card: {chosen.release / 'README.md'}")


def _sign(chosen: argparse.Namespace) -> None:
    from trap2 import signing

    count = signing.write_manifest(chosen.release)
    print(f"{count} files listed in {chosen.release / signing.MANIFEST}")
    if chosen.key is not None:
        signing.sign(chosen.release, chosen.key)
        print(f"signed: {chosen.release / signing.SIGNATURE}")


def _verify(chosen: argparse.Namespace) -> None:
    from trap2 import signing

    if chosen.key is None or (chosen.release / signing.MANIFEST).exists():
        count = signing.check_manifest(chosen.release)
        print(f"{count} files are as {signing.MANIFEST} lists them")
    if chosen.key is not None:
        signing.check_signature(chosen.release, chosen.key)
        print(f"every file is as the owner of {chosen.key} signed it")
    else:
        print("no key was given, so this does not say who made them")
    if chosen.report is not None:
        from trap2.schema import Report

        Report.load(chosen.report).check_weights(chosen.release)
        print(f"{chosen.report} is of these weights")
