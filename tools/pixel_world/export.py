"""Writes a trained demo model to assets/pixel_world/<variant>.safetensors, in half precision."""

import argparse
import os
from pathlib import Path

import torch
from membrane.tools import ROOT
from safetensors.torch import load_file, save_file

ASSETS = ROOT / "assets" / "pixel_world"


def averaged(checkpoint, part):
    """The averaged network of a training checkpoint as "<part>.<name>"."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["ema"]
    return {f"{part}.{k}": v for k, v in state.items()}


def encoder(path, part):
    """A trained text encoder as "<part>.<name>"."""
    return {f"{part}.{k}": v for k, v in load_file(str(path)).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unet", type=Path, default=ROOT / "training" / "unet.pt")
    parser.add_argument("--text", type=Path, default=ROOT / "training" / "text_encoder.safetensors")
    parser.add_argument("--no-text", action="store_true", help="leave the text encoder out; it is then read from day")
    parser.add_argument("--flux", type=Path, default=ROOT / "training" / "flux.pt")
    parser.add_argument("--t5", type=Path, default=ROOT / "training" / "t5_encoder.safetensors")
    parser.add_argument("--variant", choices=("day", "night", "transformer"), default="day")
    parser.add_argument("--license", default="Apache-2.0", help="SPDX identifier for the file's metadata")
    args = parser.parse_args()
    if args.variant == "transformer":
        tensors = averaged(args.flux, "flux") | encoder(args.t5, "t5")
    else:
        tensors = averaged(args.unet, "unet") | ({} if args.no_text else encoder(args.text, "text"))
    tensors = {k: v.half().contiguous() for k, v in tensors.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise SystemExit(f"{name} has values that half precision cannot hold")
    path = ASSETS / f"{args.variant}.safetensors"
    partial = path.with_suffix(".tmp")
    save_file(
        tensors,
        str(partial),
        metadata={
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.title": f"Membrane Pixel World ({args.variant})",
            "modelspec.architecture": "pixel-world",
            "modelspec.license": args.license,
            "license": args.license,
        },
    )
    partial.chmod(0o644)
    os.replace(partial, path)
    count = sum(t.numel() for t in tensors.values())
    print(f"{path.name}: {len(tensors)} tensors, {count} parameters, {path.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
