"""The encoders that `convert` takes, as data: the names of their settings, weights and heads in a Longformer.

All have absolute positions from a table, and layers that compute what a Longformer's do. A head is converted too if
Longformer's head for that task computes the same, and refused otherwise. To add a family: an entry of `FAMILIES`; the
family in tests/encoders.py and its heads in tests/export/test_convert.py; a row in docs/convert.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Model types that are often asked for, and the reason why they cannot be converted.
_RELATIVE = "its attention has relative positions, and a Longformer's has absolute ones"
_ROTARY = "its attention has rotary positions, and a Longformer's has absolute ones"
REFUSED = {
    **dict.fromkeys(("deberta", "deberta-v2", "funnel", "mpnet", "mt5", "t5", "umt5", "xlnet"), _RELATIVE),
    **dict.fromkeys(("eurobert", "modernbert", "nomic_bert", "roformer"), _ROTARY),
    "albert": "its embeddings are projected after their LayerNorm, and a Longformer has no such layer",
    "led": "it is an LED already; use: lfx export",
    "longformer": "it is a Longformer already; use: lfx export",
}

# Names for one function in transformers: GELU by the error function, which Longformer's masked LM head applies.
GELU = ("gelu", "gelu_python")

Names = Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """A family of encoders.

    Attributes:
        prefix: of its classes in transformers, such as Bert in BertModel.
        base: attribute of a model with a head that holds the encoder.
        heads: end of a class name, such as ForMaskedLM -> the head's weights and their names in Longformer's head of
            that task; a string is the reason why Longformer's computes something else.
        tokenizer: class of its tokenizers, for a checkpoint that names none.
        settings: Longformer's setting -> its name in the family's config, where the two differ.
        fixed: settings of Longformer that the family has in its code, not in its config.
        layers: parts of the names of the encoder's weights, and those of Longformer's.
        starts_at_zero: whether a token's position is its index, from row 0 of the table. Otherwise positions are as
            Longformer's: only ids that are no padding are counted, and the first has row pad_token_id + 1.
        head_activation: whether the masked LM head applies `hidden_act`. Otherwise it applies GELU, as Longformer's.
        replaced: pretraining class -> the class that is converted instead, without the head that Longformer lacks.
    """

    prefix: str
    base: str
    heads: Mapping[str, Names | str]
    tokenizer: str
    settings: Names = field(default_factory=dict)
    fixed: Mapping[str, float | int] = field(default_factory=dict)
    layers: Names = field(default_factory=dict)
    starts_at_zero: bool = True
    head_activation: bool = False
    replaced: Names = field(default_factory=dict)


_TOKENS: dict[str, Names | str] = {
    "Model": {},
    "ForTokenClassification": {"classifier": "classifier"},
    "ForQuestionAnswering": {"qa_outputs": "qa_outputs"},
}
_POOLED_CHOICE: dict[str, Names | str] = {"ForMultipleChoice": {"classifier": "classifier"}}
_ROBERTA_HEADS: dict[str, Names | str] = {
    **_TOKENS,
    **_POOLED_CHOICE,
    "ForMaskedLM": {"lm_head": "lm_head"},
    "ForSequenceClassification": {"classifier": "classifier"},
}
_BERT_HEADS: dict[str, Names | str] = {
    **_TOKENS,
    **_POOLED_CHOICE,
    "ForMaskedLM": {
        "cls.predictions.transform.dense": "lm_head.dense",
        "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
        "cls.predictions.decoder": "lm_head.decoder",
        "cls.predictions.bias": "lm_head.bias",
    },
    # A tanh follows the pooler, and the first layer of Longformer's head.
    "ForSequenceClassification": {"bert.pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"},
}
_ELECTRA_HEADS: dict[str, Names | str] = {
    **_TOKENS,
    "ForMaskedLM": {
        "generator_predictions.dense": "lm_head.dense",
        "generator_predictions.LayerNorm": "lm_head.layer_norm",
        "generator_lm_head": "lm_head.decoder",
    },
    "ForSequenceClassification": "its head applies GELU, and Longformer's applies tanh",
    "ForMultipleChoice": "its head sums a sequence up with GELU, and Longformer's with tanh",
}
_DISTILBERT_HEADS: dict[str, Names | str] = {
    **_TOKENS,
    "ForMaskedLM": {
        "vocab_transform": "lm_head.dense",
        "vocab_layer_norm": "lm_head.layer_norm",
        "vocab_projector": "lm_head.decoder",
    },
    "ForSequenceClassification": "its head applies ReLU, and Longformer's applies tanh",
    "ForMultipleChoice": "its head applies ReLU, and Longformer's applies tanh",
}

FAMILIES = {
    "bert": Family(
        "Bert", "bert", _BERT_HEADS, "BertTokenizer", head_activation=True, replaced={"ForPreTraining": "ForMaskedLM"}
    ),
    "roberta": Family("Roberta", "roberta", _ROBERTA_HEADS, "RobertaTokenizer", starts_at_zero=False),
    "xlm-roberta": Family("XLMRoberta", "roberta", _ROBERTA_HEADS, "XLMRobertaTokenizer", starts_at_zero=False),
    "camembert": Family("Camembert", "roberta", _ROBERTA_HEADS, "CamembertTokenizer", starts_at_zero=False),
    "electra": Family("Electra", "electra", _ELECTRA_HEADS, "BertTokenizer", replaced={"ForPreTraining": "Model"}),
    "distilbert": Family(
        "DistilBert",
        "distilbert",
        _DISTILBERT_HEADS,
        "BertTokenizer",
        settings={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        fixed={"layer_norm_eps": 1e-12, "type_vocab_size": 1},
        layers={
            "transformer.layer.": "encoder.layer.",
            ".attention.q_lin.": ".attention.self.query.",
            ".attention.k_lin.": ".attention.self.key.",
            ".attention.v_lin.": ".attention.self.value.",
            ".attention.out_lin.": ".attention.output.dense.",
            ".sa_layer_norm.": ".attention.output.LayerNorm.",
            ".ffn.lin1.": ".intermediate.dense.",
            ".ffn.lin2.": ".output.dense.",
            ".output_layer_norm.": ".output.LayerNorm.",
        },
        head_activation=True,
    ),
}

CONVERTIBLE = (*FAMILIES, "bart")  # a BART becomes an LED
