"""The flags of `analyze`, from which its command line is built; imports nothing heavy. Tested in test_cli.py."""

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
    """Which documents: all, only those that the checkpoint was trained on, or only those held out from training."""
    max_tokens: int | None = None
    """Stop after this many kept tokens of the split, in store order. By default all are analysed. The same limit
    applies to the validation tokens and to the training tokens that PCA is fitted on."""

    def __post_init__(self) -> None:
        require_at_least(1, max_tokens=self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class StatisticsOptions:
    """How numbers are computed, and what they are compared with."""

    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Number format for encoding. float32 gives the same numbers on every CPU up to rounding; bfloat16, for the
    encoder's product only, is several times faster on hardware that supports it. Sums are always in float64."""
    device: str = "auto"
    """Where vectors are encoded: cpu, cuda, cuda:1, ...; auto: CUDA if there is one."""
    pca: bool = True
    """Fit PCA with k components on the training documents, and show its FVU on the validation documents next to the
    autoencoder's."""
    intervals: bool = True
    """Add 95 % intervals over documents."""
    nulls: bool = True
    """Compare with null models: the same codes, with layers permuted within each token, or tokens within each layer."""
    seed: int = 0
    """Seed for the null models and all other random draws."""

    def __post_init__(self) -> None:
        require_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class LatentOptions:
    """What is computed for each latent."""

    redundancy: bool = True
    """Compare all decoder rows with each other (nearest latents, MMCS, near-parallel pairs); takes time that grows with
    the square of the number of latents that fired."""
    redundancy_cosine: float = 0.9
    """Cosine of decoder rows above which two latents are near-parallel."""
    examples: bool = True
    """Find each latent's maximally activating examples at each layer, with the text around them (token ids if the
    model's tokenizer is not on this machine), and the histogram of its activations."""
    save_latents: bool = False
    """Save the sparse codes in the store (latents/KEY: Zarr arrays of values and indices): 8 * k bytes for each vector,
    or four times as many if the number of active latents varies. Later analyses of this autoencoder on this store then
    use them instead of encoding again, even without this flag."""

    def __post_init__(self) -> None:
        if not 0 <= self.redundancy_cosine < 1:
            raise UsageError(f"--redundancy-cosine should be at least 0 and below 1, found {self.redundancy_cosine}")


@dataclass(frozen=True, kw_only=True)
class TransformerOptions:
    """What the store's transformer is run for, and where it is."""

    downstream_tokens: int | None = None
    """Run the transformer with each layer replaced by its reconstruction, and compare its predictions at this many
    tokens of held-out documents (or, without any, of the analysed ones); 0 to skip this. By default as many as take
    about a minute on two cores if the store's model is on this machine, otherwise none."""
    latent_logits: bool = True
    """Find the tokens that each latent promotes, suppresses and is closest to, if the store's model is on this
    machine."""
    model: str | None = None
    """Folder or GGUF file of the store's model, if neither the store nor the file with the harvest's options next to it
    (acts.harvest.toml) says where it is."""
    lens: str | None = None
    """Folder of the store's tuned lens, if it came from a folder and acts.harvest.toml does not say which."""

    def __post_init__(self) -> None:
        require_at_least(0, downstream_tokens=self.downstream_tokens)

    @property
    def asked_for(self) -> bool:
        """Whether a flag requires the model: then it is an error if there is none, and it may be downloaded."""
        return bool(self.downstream_tokens) or self.model is not None or self.lens is not None


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Your own texts, seen through the autoencoder."""

    prompt: tuple[str, ...] = ()
    """Texts to run through the model and the autoencoder: the report then shows which latents are active at which token
    and layer. An analysis of the same store and autoencoder that is already in the output folder is kept."""
    ablate: tuple[str, ...] = ()
    """With --prompt: ablate a latent (LATENT or LATENT:LAYER) and show how the next token changes. Give several layers
    as 17:3,4,5 or 17:all; without a layer, the one where it is strongest. Give positions in the text, counted from 0
    including the opening token, as 17:3@5,6. By default the prompt's eight most specific latents, one at a time."""
    steer: tuple[str, ...] = ()
    """With --prompt: add to a latent's activation (LATENT:LAYER:COEFFICIENT, in units of activation); layers and
    positions (17:3:8@5) as for --ablate."""

    def __post_init__(self) -> None:
        if (self.ablate or self.steer) and not self.prompt:
            raise UsageError("--ablate and --steer need a text: give one with --prompt")


@dataclass(frozen=True, kw_only=True)
class DelphiOptions:
    """Latents explained and scored by language models, using EleutherAI's delphi."""

    export_delphi: Path | None = None
    """New folder for the latents' activations in delphi's format: see docs/delphi.md. An analysis of the same store and
    autoencoder that is already in the output folder is kept."""
    delphi_latents: tuple[int, ...] = ()
    """With --export-delphi: which latents. By default those that fired at 200 tokens or more, because delphi explains
    no latent with fewer examples."""
    delphi_scores: Path | None = None
    """Folder with delphi's results (`explanations` and `scores`), to add to the analysis and its report."""

    def __post_init__(self) -> None:
        if self.delphi_latents and self.export_delphi is None:
            raise UsageError("--delphi-latents chooses what to export: give a folder with --export-delphi")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written and printed."""

    report: bool = True
    """Draw the figures and write report.html."""
    json: bool = False
    """Print summary.json on stdout as one line, and the text on stderr."""


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Where tasks run."""

    scheduler: str = "threads"
    """Where tasks run: `threads` of this process, `processes` of this machine (a Dask LocalCluster), or the address of
    a Dask scheduler (tcp://HOST:8786) whose workers see the same paths."""
    n_workers: int | None = None
    """Number of threads or processes. By default one per core; with a scheduler's address, it has its own workers."""
    performance_report: Path | None = None
    """HTML file for Dask's report of which task ran where and when; needs the `dashboard` extra."""

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
    """Folder of the activation store written by `harvest`."""
    sae: Path
    """The autoencoder: a checkpoint written by `train`, a folder in the format of mlsae, SAELens or sparsify, or the
    owner/name of a hub repository."""
    out: Path | None = None
    """Folder for summary.json, latents.parquet, layers.parquet, figures and report.html; earlier results in it are
    replaced. By default next to the checkpoint (ckpt.analysis for ckpt.pt); for a hub repository, NAME.analysis in the
    current folder."""
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
        """Folder for the results."""
        if self.out is not None:
            return self.out
        if self.sae.exists():
            sae = self.sae.resolve() if self.sae.name in ("", "..") else self.sae
            return sae.with_name(sae.name + ".analysis") if sae.is_dir() else beside(sae, ".analysis")
        return Path(self.sae.name + ".analysis")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Analyses to compare."""

    compare: tuple[Path, ...]
    """Folders written by `analyze`, or their summary.json; for example models of several sizes, or with and without a
    lens."""
    out: Path = Path("comparison")
    """Folder for compare.parquet, compare.json, compare.png and compare.svg."""
    json: bool = False
    """Print compare.json on stdout as one line instead of the table."""
