"""The options of `analyze`, from which its command line is generated; imports nothing heavy. Tested in test_cli.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from residscope.errors import UsageError
from residscope.names import beside
from residscope.options import require_at_least, require_seed, require_workers

DocumentSplit = Literal["all", "train", "validation"]


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """Which tokens are analysed."""

    split: DocumentSplit = "all"
    """Which documents: every one, or the checkpoint's own training or validation documents."""
    max_tokens: int | None = None
    """Stop after this many kept tokens of the split, in store order. By default all of them. The same limit
    applies to the validation tokens and to the training tokens of PCA."""

    def __post_init__(self) -> None:
        require_at_least(1, max_tokens=self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class StatisticsOptions:
    """How numbers are computed and what they are compared with."""

    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Number format of the encoder's product; float32 gives the same numbers on every CPU, bfloat16 is several times
    faster where the hardware has it. Sums are always float64, on the CPU."""
    device: str = "auto"
    """Where vectors are encoded: cpu, cuda, cuda:1, ...; auto: CUDA if there is one."""
    pca: bool = True
    """Fit PCA with k components on the training documents and show its FVU on the validation documents beside the
    autoencoder's."""
    intervals: bool = True
    """Compute 95 % intervals over documents."""
    nulls: bool = True
    """Compare with null models: the same codes with layers permuted within each token, and with tokens permuted within
    each layer."""
    seed: int = 0
    """Seed of the null models and of other draws."""

    def __post_init__(self) -> None:
        require_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class LatentOptions:
    """What is found about each latent."""

    redundancy: bool = True
    """Compare all decoder rows with each other: nearest latents, MMCS, near-parallel pairs; the time grows with the
    square of the number of live latents."""
    redundancy_cosine: float = 0.9
    """Cosine of decoder rows above which two latents are near-parallel."""
    examples: bool = True
    """Find each latent's maximally activating examples at each layer, with text around them (as token ids if the
    model's tokenizer is not on this machine), and the histogram of its activations."""
    save_latents: bool = False
    """Keep the sparse codes inside the store (latents/KEY: Zarr arrays of values and indices), 8 * k bytes for each
    vector, four times that where the number of active latents varies. Later analyses of this autoencoder on this store
    use them, even without this flag, and encode nothing again."""

    def __post_init__(self) -> None:
        if not 0 <= self.redundancy_cosine < 1:
            raise UsageError(f"--redundancy-cosine should be at least 0 and below 1, found {self.redundancy_cosine}")


@dataclass(frozen=True, kw_only=True)
class TransformerOptions:
    """Where the store's transformer is, and what it is run for."""

    downstream_tokens: int | None = None
    """Run the transformer with each layer replaced by its reconstruction, and compare its predictions at this
    many tokens of held-out documents (or else of the analysed ones); 0 for none. By default as many as take about a
    minute on two cores, if the store's model is on this machine; otherwise this step is skipped."""
    latent_logits: bool = True
    """Find the tokens that each latent promotes, suppresses and is nearest to, if the store's model is on this
    machine."""
    model: str | None = None
    """Where the store's model is, a folder or a GGUF file, if neither the store nor the file with the harvest's options
    beside it (acts.harvest.toml) says where."""
    lens: str | None = None
    """Where the store's tuned lens is, if it came from a folder and acts.harvest.toml does not say where."""

    def __post_init__(self) -> None:
        require_at_least(0, downstream_tokens=self.downstream_tokens)

    @property
    def asked_for(self) -> bool:
        """Whether the model was asked for explicitly, so that its absence is an error and the network may be used."""
        return bool(self.downstream_tokens) or self.model is not None or self.lens is not None


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Texts of your own, seen through the autoencoder."""

    prompt: tuple[str, ...] = ()
    """Texts to look at through the autoencoder: adds to the report which latents are active at which token and layer.
    An analysis of the same store and autoencoder already in the output folder is kept."""
    ablate: tuple[str, ...] = ()
    """With --prompt: remove a latent, LATENT or LATENT:LAYER, and show how the next token changes. Several layers:
    17:3,4,5, or 17:all; without a layer, where it is strongest. At some positions only, counted from 0 at the opening:
    17:3@5,6. By default the prompt's eight most specific latents, one at a time."""
    steer: tuple[str, ...] = ()
    """With --prompt: add to a latent, LATENT:LAYER:COEFFICIENT, in units of activation; layers and
    positions (17:3:8@5) as for --ablate."""

    def __post_init__(self) -> None:
        if (self.ablate or self.steer) and not self.prompt:
            raise UsageError("--ablate and --steer need a text: give one with --prompt")


@dataclass(frozen=True, kw_only=True)
class DelphiOptions:
    """Latents explained and scored by language models, with EleutherAI's delphi."""

    export_delphi: Path | None = None
    """New folder for the activations of latents, as delphi reads them: see docs/delphi.md. An analysis of the same
    store and autoencoder already in the output folder is kept."""
    delphi_latents: tuple[int, ...] = ()
    """With --export-delphi: which latents. By default those that fired at 200 tokens or more; delphi explains no
    latent with fewer examples."""
    delphi_scores: Path | None = None
    """Folder with delphi's results, `explanations` and `scores`, to add to the analysis and its report."""

    def __post_init__(self) -> None:
        if self.delphi_latents and self.export_delphi is None:
            raise UsageError("--delphi-latents needs an export: give a folder with --export-delphi")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written and printed."""

    report: bool = True
    """Draw the figures and write report.html."""
    json: bool = False
    """Print summary.json on stdout, as one line, and the readable summary on stderr."""


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Where the work is done."""

    scheduler: str = "threads"
    """Where tasks run: `threads` of this process, `processes` of this machine (a Dask LocalCluster), or the address of
    a Dask scheduler (tcp://HOST:8786) whose workers see the same paths."""
    n_workers: int | None = None
    """Threads or processes that work at once. By default one per core; with a scheduler's address, its workers
    instead."""
    performance_report: Path | None = None
    """HTML file for Dask's report on which task ran where and when; needs the `dashboard` extra."""

    def __post_init__(self) -> None:
        require_workers(n_workers=None if ":" in self.scheduler else self.n_workers)
        require_at_least(1, n_workers=self.n_workers)
        if self.scheduler not in ("threads", "processes") and ":" not in self.scheduler:
            wanted = "threads, processes or an address such as tcp://HOST:8786"
            raise UsageError(f"--scheduler should be {wanted}, found {self.scheduler!r}")


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """An analysis of how an autoencoder's latents spread over the layers of a store."""

    FIRST_FLAGS: ClassVar = (
        *("store", "sae", "out", "split", "max_tokens", "prompt", "model", "downstream_tokens", "report", "json"),
    )

    store: Path
    """Folder of the activation store, as `harvest` wrote it."""
    sae: Path
    """The autoencoder: a checkpoint as `train` wrote it, a folder in the format of mlsae, SAELens or sparsify, or the
    owner/name of a hub repository."""
    out: Path | None = None
    """Folder for summary.json, latents.parquet, layers.parquet, figures and report.html; existing results in it are
    replaced. By default CHECKPOINT.analysis beside the checkpoint: ckpt.analysis for ckpt.pt; for a hub repository
    NAME.analysis here."""
    tokens: TokenOptions = TokenOptions()
    statistics: StatisticsOptions = StatisticsOptions()
    latents: LatentOptions = LatentOptions()
    transformer: TransformerOptions = TransformerOptions()
    prompts: PromptOptions = PromptOptions()
    delphi: DelphiOptions = DelphiOptions()
    output: OutputOptions = OutputOptions()
    workers: WorkerOptions = WorkerOptions()

    @property
    def out_dir(self) -> Path:
        """Where results go."""
        if self.out is not None:
            return self.out
        if self.sae.exists():
            sae = self.sae.resolve() if self.sae.name in ("", "..") else self.sae
            return sae.with_name(sae.name + ".analysis") if sae.is_dir() else beside(sae, ".analysis")
        return Path(self.sae.name + ".analysis")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Analyses to put side by side."""

    compare: tuple[Path, ...]
    """Folders from `analyze`, or their summary.json: models of any size, with or without a lens, trained or not."""
    out: Path = Path("comparison")
    """Folder for compare.parquet, compare.json, compare.png and compare.svg."""
    json: bool = False
    """Print compare.json on stdout, as one line, and no table."""
