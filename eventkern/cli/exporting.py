"""`eventkern export`: a checkpoint's inference path as a program that torch runs alone. torch loads inside."""

from __future__ import annotations

from eventkern.cli.arguments import Export
from eventkern.cli.commands import checkpoint_of, load_model, load_run, quantize, require_parent


def export(command: Export) -> None:
    """`eventkern export`."""
    from eventkern.train.failures import explained

    with explained(f"on --device {command.device}: export where there is more", compiles=False):
        export_checkpoint(command)


def export_checkpoint(command: Export) -> None:
    """Writes the program of a checkpoint, and says what it takes."""
    from eventkern.models import EventTransformerConfig
    from eventkern.models.export import exported_bytes
    from eventkern.train.device import select_device
    from eventkern.train.whole_files import write_file

    require_parent(command.out)
    device = select_device(command.device)
    path = checkpoint_of(command.checkpoint)
    state = load_run(path)
    config = EventTransformerConfig(**state["metadata"]["model"])
    model = load_model(path, state, config)
    quantize(model, command.quantize, path)
    program = exported_bytes(model.to(device))
    write_file(command.out, program)
    categories = len(config.category_names)
    print(
        f"wrote {command.out} ({len(program) / 1e6:.2f} MB): sources (B, {config.num_streams}, {config.src_seq_len}, "
        f"{categories}) and events (B, 1 to {config.tgt_seq_len}, {categories}), int32, to logits by category; "
        f"torch.export.load({str(command.out)!r}).module() runs it"
    )
