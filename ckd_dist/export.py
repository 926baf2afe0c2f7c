"""Write the network of a checkpoint in a form that other programs take.

  python -m ckd_dist.export --checkpoint runs/student/checkpoints/epoch_0016.pt --format onnx --out student.onnx

Weights by name: state_dict (torch.load) and safetensors. Programs, for batches of any size: onnx, torchscript and
torch_export; each is run once and compared with the network. All take images normalised as the command says; formats
with metadata say so too. A file that is there already stays as it is.
"""

from pathlib import Path

from ckd_dist.core.process import run_command
from ckd_dist.train.options import ExportConfig


def main(config: ExportConfig) -> None:
    """Write the file."""
    # Imported here because torch takes seconds: only once the options are known to be good.
    from ckd_dist.core import dist

    with dist.process_group():
        dist.on_main(lambda: write(config))


def write(config: ExportConfig) -> None:
    """Write the file, on one rank; raises `UserError` where another is there already."""
    from ckd_dist.core.console import say
    from ckd_dist.core.errors import require
    from ckd_dist.core.files import require_regular, write_bytes_atomically
    from ckd_dist.nn import export, models

    out = Path(config.out)
    require(out.parent.is_dir(), f"out: no such folder: {out.parent}")
    if out.exists():
        require_regular(out, "out")
    model, metadata = models.load_model(config.checkpoint, "checkpoint", config.model)
    content, checked = export.export(model, metadata, config.format, config.checkpoint)
    if out.exists():
        same = out.read_bytes() == content
        require(same, f"out: {out} is there already, and another: remove it, or name a new file")
    else:
        write_bytes_atomically(out, content)
    note = export.description(metadata)
    mean, std = (" ".join(f"{value:.4g}" for value in note[name]) for name in ("mean", "std"))
    say(
        f"{out}: {note['model']} of {note['num_classes']} classes as {config.format}, {len(content):,} bytes; {checked}"
    )
    say(
        f"input: float32 [n, 3, {note['image_size']}, {note['image_size']}], RGB, (pixel / 255 - mean) / std with mean "
        f"{mean} and std {std}; output: logits [n, {note['num_classes']}]"
    )


if __name__ == "__main__":
    run_command(main, ExportConfig, "ckd_dist.export")
