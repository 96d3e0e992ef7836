"""`convert` of a BART: an LED that computes the same on short sequences, and takes long ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lfx.errors import ExportError, ParityError
from lfx.export import bart as conversion
from lfx.export import convert, export
from lfx.export.led import LED_CLASSES
from lfx.export.load import load
from tests.models import tiny_tokenizer

SETTINGS = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
    "init_std": 0.2,
}
OPTIONS: dict[str, Any] = {"max_seqlen": 100, "attention_window": 16}


def tiny_bart(architecture: str = "BartForConditionalGeneration", **changes: Any) -> Any:
    """A random BART, every parameter drawn, in eval mode."""
    torch.manual_seed(0)
    config = transformers.BartConfig(**{**SETTINGS, **changes})
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("bias"):
                tensor.normal_(0.0, 0.1)
    return model


@pytest.mark.parametrize("task", LED_CLASSES)
def test_the_led_computes_what_the_bart_does_within_the_window(task: str, tmp_path: Path) -> None:
    original = tiny_bart(LED_CLASSES[task].replace("LED", "Bart"))
    original.save_pretrained(tmp_path / "bart")
    folder = convert(tmp_path / "bart", tmp_path / "led", **OPTIONS)
    made, loaded_task = load(str(folder))
    assert loaded_task == task
    assert type(made).__name__ == LED_CLASSES[task]
    ids = torch.randint(4, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = original.config.eos_token_id
    with torch.no_grad():
        expected = original(ids)
        for marks in (torch.zeros_like(ids), torch.ones_like(ids)):  # a window has all tokens
            actual = made(ids, global_attention_mask=marks)
            torch.testing.assert_close(actual[0], expected[0], atol=2e-5, rtol=0.0)


def test_positions_repeat_and_the_decoder_keeps_its_own(tmp_path: Path) -> None:
    original = tiny_bart()
    original.save_pretrained(tmp_path / "bart")
    made: Any = load(str(convert(tmp_path / "bart", tmp_path / "led", **OPTIONS)))[0]
    config = made.config
    assert (config.max_encoder_position_embeddings, config.max_decoder_position_embeddings) == (112, 40)
    assert config.attention_window == [16, 16]
    rows = original.model.encoder.embed_positions.weight[2:]
    torch.testing.assert_close(made.led.encoder.embed_positions.weight, rows[torch.arange(112) % 40])
    torch.testing.assert_close(
        made.led.decoder.embed_positions.weight, original.model.decoder.embed_positions.weight[2:]
    )
    attention = made.led.encoder.layers[1].self_attn.longformer_self_attn
    torch.testing.assert_close(attention.key_global.weight, attention.key.weight)
    assert made.lm_head.weight is made.led.shared.weight
    torch.testing.assert_close(made.final_logits_bias, original.final_logits_bias)


def test_a_table_that_the_checkpoint_stores_apart_is_not_tied(tmp_path: Path) -> None:
    tiny_bart().save_pretrained(tmp_path / "bart")
    path = tmp_path / "bart" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "lm_head.weight": 2 * weights["model.shared.weight"]}, path, {"format": "pt"})
    made: Any = load(str(convert(tmp_path / "bart", tmp_path / "led", **OPTIONS)))[0]
    torch.testing.assert_close(made.lm_head.weight, 2 * made.led.shared.weight)
    torch.testing.assert_close(made.led.encoder.embed_tokens.weight, made.led.shared.weight)


def test_the_options_of_generation_and_the_tokenizer_are_carried(tmp_path: Path) -> None:
    original = tiny_bart()
    original.generation_config.num_beams = 4
    original.generation_config.forced_bos_token_id = 0
    original.save_pretrained(tmp_path / "bart")
    tiny_tokenizer().save_pretrained(tmp_path / "bart")
    folder = convert(tmp_path / "bart", tmp_path / "led", **OPTIONS)
    made: Any = load(str(folder))[0]
    assert (made.generation_config.num_beams, made.generation_config.forced_bos_token_id) == (4, 0)
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 100


@pytest.mark.slow
def test_a_converted_checkpoint_exports(tmp_path: Path) -> None:
    tiny_bart().save_pretrained(tmp_path / "bart")
    bundle = export(convert(tmp_path / "bart", tmp_path / "led", **OPTIONS), tmp_path / "bundle")
    assert (bundle / "decoder_model.onnx").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_embedding": True}, "multiplies its embeddings by √d_model"),
        ({"architectures": ["BartForCausalLM"]}, "has architecture BartForCausalLM; give one of: BartModel"),
        ({"decoder_start_token_id": None}, "decoder_start_token_id is None"),
        ({"max_position_embeddings": 0}, "max_position_embeddings 0 is out of range"),
        ({"d_model": 33}, "encoder_attention_heads 2 does not divide d_model 33"),
    ],
    ids=str,
)
def test_a_bart_that_cannot_become_an_led_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny_bart().save_pretrained(tmp_path / "bart")
    path = tmp_path / "bart" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ExportError, match=message):
        convert(tmp_path / "bart", tmp_path / "led", **OPTIONS)
    assert not (tmp_path / "led").exists()


def test_a_wrong_conversion_is_out_of_tolerance_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_bart().save_pretrained(tmp_path / "bart")
    monkeypatch.setattr(conversion, "_PROJECTIONS", {"q_proj": "key", "k_proj": "query", "v_proj": "value"})
    with pytest.raises(ParityError, match=r"error .* is above the tolerance"):
        convert(tmp_path / "bart", tmp_path / "led", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["bart"]
