"""`videoanchor convert`: a checkpoint with code of its own in transformers' format."""

import argparse
from dataclasses import asdict
from pathlib import Path

from ..libraries import prepare_libraries
from ..text import json_text, printable
from .shared import Commands, ProgressLine


def add(commands: Commands) -> None:
    """Adds the command."""
    convert = commands.add_parser(
        "convert",
        help="a checkpoint that needs its own code (InternVL2, LLaVA-Video) in transformers' format",
        description="Writes a checkpoint in the format of its own repository again in transformers' format, for "
        "`videoanchor run --model`. Converts InternVL2, 2.5 and 3 (internvl_chat; decoders InternLM2, Llama, Qwen2, "
        "Qwen3) and LLaVA-Video (llava_qwen). Reads safetensors and runs no code of the checkpoint. Needs as much disk "
        "as the weights take and memory for one shard.",
        epilog="Download first: hf download OpenGVLab/InternVL2-8B --local-dir InternVL2-8B",
    )
    convert.add_argument("source", type=Path, metavar="SOURCE", help="folder of the checkpoint as it was downloaded")
    convert.add_argument("--out", required=True, type=Path, metavar="DIR", help="a folder that does not exist yet")
    convert.add_argument("--json", action="store_true", help="print the report as JSON")
    convert.set_defaults(command=_convert)


def _convert(args: argparse.Namespace) -> int:
    from ..output import check_folder

    check_folder(args.out)
    prepare_libraries()
    from ...integrations.transformers.convert.conversion import convert_checkpoint

    progress = ProgressLine(not args.json)
    try:
        converted = convert_checkpoint(args.source, args.out, progress=progress)
    finally:
        progress.close()
    if args.json:
        print(json_text({**asdict(converted), "out": str(converted.out)}))
        return 0
    out = printable(converted.out)
    print(f"read      {printable(args.source)}: {printable(converted.source)}")
    print(
        f"wrote     {out}: {converted.architecture}, {converted.n_tensors} tensors in "
        f"{converted.n_shards} {'file' if converted.n_shards == 1 else 'files'}, {converted.n_bytes / 2**30:.1f} GiB"
    )
    for note in converted.notes:
        print(f"note      {printable(note)}")
    print("Next (InternVL2-8B has --preset internvl2-8b in place of the alphas):")
    print(f"videoanchor run --model {out} --video FILE --question '...' --alpha-k A --alpha-v A --out DIR")
    return 0
