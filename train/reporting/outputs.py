"""What a finished run leaves beside its checkpoint, and on the hub: ckpt.safetensors, ckpt.loss.png, a model card.

All of it is made from the checkpoint and the metrics file, so a run that was killed just after its last checkpoint gets
it on the next --resume. Formats: `train.formats.files`; the upload itself: `train.formats.hub`.
"""

import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from residscope.names import beside, stem
from train.checkpoint import Checkpoint, load_checkpoint
from train.config import PublishConfig
from train.reporting.loss_figure import write_loss_figure
from train.reporting.report import TrainResult


def check_publish(config: PublishConfig) -> None:
    """Before the training, refuse trackers that are not installed and an upload that cannot work."""
    for package, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb is not None)):
        if wanted and importlib.util.find_spec(package) is None:
            raise ResidscopeError(
                f"--{package}: the package {package} is not installed: `pip install 'residscope[{package}]'`, or leave "
                "the flag out (the metrics are in the .metrics.jsonl file in any case)"
            )
    if config.push_to_hub is None:
        return
    from huggingface_hub import constants

    from train.formats.hub import HUB_ID

    if HUB_ID.fullmatch(config.push_to_hub) is None:
        raise UsageError(f"--push-to-hub should be OWNER/NAME, found {config.push_to_hub!r}")
    if constants.HF_HUB_OFFLINE:
        way_out = "HF_HUB_OFFLINE is set: unset it, or leave the flag out"
        raise ResidscopeError(f"--push-to-hub {config.push_to_hub}: {way_out}")


def write_outputs(result: TrainResult, *, anew: bool) -> None:
    """Write the weights as safetensors and the loss figure; anew: replace those that exist."""
    from train.formats.files import write_safetensors

    target, picture = beside(result.checkpoint, ".safetensors"), beside(result.checkpoint, ".loss.png")
    if anew or not target.exists():
        saved = _saved(result)
        write_safetensors(saved.sae, target, store=saved.store, trainer=saved.trainer)
    if anew or not picture.exists():
        metrics = beside(result.checkpoint, ".metrics.jsonl")
        model = result.plan.model
        k = f", k {model.active}" if model.active else ""
        title = f"{stem(result.checkpoint)}: {model.n_latents} latents{k}"
        if metrics.exists():
            write_loss_figure(metrics, picture, title)


def _saved(result: TrainResult) -> Checkpoint:
    """The run's checkpoint, read from the disk; raises unless it is the one that this run wrote."""
    saved = load_checkpoint(result.checkpoint)
    if repr(saved.trainer.get("metrics")) != repr(result.metrics):
        raise IncompatibleError(f"{result.checkpoint} is not what this run saved: another was put in its place since")
    return saved


def push(results: Sequence[TrainResult], config: PublishConfig) -> str:
    """Upload each run's files and model card, a single run at the top, several in folders by name; the address."""
    from train.formats.hub import last_metrics, model_card, push_to_hub

    assert config.push_to_hub is not None
    with tempfile.TemporaryDirectory(prefix="residscope-hub-") as name:
        root = Path(name)
        for result in results:
            folder = root / result.spec.name
            folder.mkdir(exist_ok=True)
            saved, metrics = _saved(result), beside(result.checkpoint, ".metrics.jsonl")
            shutil.copyfile(beside(result.checkpoint, ".safetensors"), folder / "ckpt.safetensors")
            for ending in (".metrics.jsonl", ".loss.png"):
                if (source := beside(result.checkpoint, ending)).exists():
                    shutil.copyfile(source, folder / f"ckpt{ending}")
            about = {"license": config.hub_license, "repo_id": config.push_to_hub, "subfolder": result.spec.name}
            card = model_card(saved, last_metrics(metrics), **about)
            (folder / "README.md").write_text(card, encoding="utf-8")
        try:
            return push_to_hub(root, config.push_to_hub, private=config.hub_private)
        except ResidscopeError as error:
            again = "the checkpoints are saved; with --resume the same command tries again"
            raise ResidscopeError(f"{error} ({again})") from None
