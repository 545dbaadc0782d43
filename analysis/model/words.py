"""What `analyze` says of the parts that need the transformer: downstream quality and the tokens of latents.

Made from summary.json alone, like `analysis.words`.
"""

from collections.abc import Mapping
from typing import Any

from analysis.word_tables import shown, some, table, with_interval


def model_words(summary: Mapping[str, Any]) -> list[str]:
    """Lines; none where nothing was asked for."""
    reason = summary["transformer"]["reason"]
    if reason:
        return [
            "",
            f"No downstream quality and no tokens of latents: {reason} (--model FOLDER says where the model is, "
            "--downstream-tokens N fetches one of the hub, --downstream-tokens 0 --no-latent-logits goes without.)",
        ]
    return [*_downstream_words(summary), *_token_words(summary["latent_logits"])]


def _downstream_words(summary: Mapping[str, Any]) -> list[str]:
    found = summary["downstream"]
    if not found:
        return []
    whose = "validation" if found["tokens"] == "validation" else "analysed"
    head = ("layer", "delta CE", "KL", "loss recovered (mean ablation)", "(zero ablation)", "mean ablation's delta CE")
    names = (
        *("delta_ce", "kl", "loss_recovered_mean", "loss_recovered_zero"),
        "mean_ablation_delta_ce",
    )
    return [
        "",
        f"Downstream, each layer replaced alone by its reconstruction, {found['n_tokens']:,} {whose} tokens "
        f"(true CE {shown(found['true_ce'])} nats; delta CE and KL in nats per token: lower is better; "
        "loss recovered: 1 is perfect, 0 as bad as ablation)",
        *table(
            head,
            [(str(row["layer"]), *(shown(row[name]) for name in names)) for row in some(summary["layers"])],
        ),
        f"Mean over layers: delta CE {with_interval(found, 'delta_ce')}, KL {with_interval(found, 'kl')}, "
        f"loss recovered {with_interval(found, 'loss_recovered_mean')} against mean ablation.",
    ]


def _token_words(found: Mapping[str, Any] | None) -> list[str]:
    if not found:
        return []
    return [
        "Decoder rows against tokens, median of the highest cosine (in brackets: of random directions): embedding "
        f"{shown(found['embedding_cosine'])} ({shown(found['embedding_chance'])}), unembedding "
        f"{shown(found['unembedding_cosine'])} ({shown(found['unembedding_chance'])})."
    ]
