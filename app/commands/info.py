"""`videoanchor info`: what is installed, what the device can do, and which models can be gated."""

import argparse
import json
from dataclasses import asdict

from ..libraries import prepare_libraries
from .shared import Commands, machine_lines


def add(commands: Commands) -> None:
    """Adds the command."""
    info = commands.add_parser("info", help="versions, device and what each attention backend can do here")
    info.add_argument("--json", action="store_true")
    info.add_argument(
        "--backbones", action="store_true", help="instead: the models of the installed transformers that can be gated"
    )
    info.set_defaults(command=_info)


def _info(args: argparse.Namespace) -> int:
    prepare_libraries()
    if args.backbones:
        return _info_backbones(args.json)
    from ..machine import devices_of, machine

    report = machine(devices_of("auto"))
    print(json.dumps(report, indent=2) if args.json else "\n".join(machine_lines(report)))
    return 0


def _info_backbones(as_json: bool) -> int:
    import transformers

    from ...integrations.transformers.backbones import installed_backbones

    found = installed_backbones()
    if as_json:
        report = {"transformers": transformers.__version__, "backbones": [asdict(backbone) for backbone in found]}
        print(json.dumps(report, indent=2))
        return 0
    name_width, class_width = (max(len(getattr(one, key)) for one in found) for key in ("name", "model"))
    print(f"{'name':{name_width}s}  tested  {'class':{class_width}s}  visual token ids")
    for one in found:
        ids = ", ".join(f"{modality} {token}" for modality, token in one.token_ids.items()) or "the checkpoint's"
        shown = "yes" if one.tested else "no"
        print(f"{one.name:{name_width}s}  {shown:6s}  {one.model:{class_width}s}  {ids}")
    print(
        f"\ntransformers {transformers.__version__}. Tested: tokens and logits equal to a dense gate's on a tiny "
        f"random model, with the class's own decoder or with those below; other pairs warn. Token ids are the default "
        f"config's; a checkpoint's own count."
    )
    for one in found:
        if one.tested_as is not None and one.tested_as.decoders:
            print(f"{one.name}: decoders {', '.join(one.tested_as.decoders)}.")
    for one in found:
        if one.tested_as is not None and one.tested_as.note:
            print(f"{one.name}: {one.tested_as.note}.")
    return 0
