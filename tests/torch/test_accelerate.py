"""`accelerate`: equal to Hugging Face's model in every case, under torch.compile, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from transformers import LEDConfig, LEDForConditionalGeneration, LEDForQuestionAnswering, LEDModel, LongformerModel
from transformers.models.longformer import modeling_longformer
from transformers.models.longformer.modeling_longformer import (
    LongformerEncoder,
    LongformerLayer,
    LongformerSelfAttention,
)

from lfx.errors import ExportError, InputError
from lfx.export import export, use_loop_attention
from lfx.export.torch_runners import reference_runner, torch_runner
from lfx.parity import Arrays, Case, Runner, compare, full_cases, inputs_of, quick_cases
from lfx.signature import SENTENCE_EMBEDDING, TASKS
from lfx.torch import accelerate, cpu_kernels
from tests.models import VOCAB_SIZE, WINDOW, tiny_config, tiny_model


def runner(model: nn.Module) -> Runner:
    """A model as a function of numpy inputs, with its tensor outputs by name."""

    def run(inputs: Arrays) -> Arrays:
        with torch.inference_mode():
            outputs = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        tensors = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        return {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in tensors.items()}

    return run


def make_inputs(case: Case, choices: int | None = None) -> Arrays:
    """The inputs of a case."""
    return inputs_of(case, vocab_size=VOCAB_SIZE, pad_token_id=1, choices=choices)


def require_parity(model: nn.Module, accelerated: nn.Module, cases: list[Case], **options: Any) -> None:
    """Compare with the dense float64 reference, with Hugging Face's own model as the witness."""
    report = compare(
        cases,
        lambda case: make_inputs(case, **options),
        reference=reference_runner(model),
        witness=torch_runner(model),
        candidate=runner(accelerated),
        precision="fp32",
        layers=2,
    )
    report.require()


@pytest.mark.parametrize("max_global", [None, 128], ids=["any number of globals", "128 slots"])
def test_the_full_cases_agree_with_hugging_face(max_global: int | None) -> None:
    model = tiny_model()
    cases = full_cases(WINDOW, 128)
    assert len(cases) >= 60
    require_parity(model, accelerate(copy.deepcopy(model), max_global=max_global), cases)


def test_pytorch_s_operators_agree_with_hugging_face_where_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_kernels, "kernels_for", lambda tensor: None)
    model = tiny_model()
    require_parity(model, accelerate(copy.deepcopy(model)), full_cases(WINDOW, 128))


@pytest.mark.parametrize("task", [task for task in TASKS if task != SENTENCE_EMBEDDING])
def test_every_task_agrees_with_hugging_face(task: str) -> None:
    model = tiny_model(task)
    choices = 2 if TASKS[task].has_choices else None
    require_parity(model, accelerate(copy.deepcopy(model)), quick_cases(WINDOW, 128), choices=choices)


def test_the_global_tokens_of_a_task_are_hugging_face_s() -> None:
    model = tiny_model("text-classification")
    ids = torch.randint(3, VOCAB_SIZE, (2, 21), generator=torch.Generator().manual_seed(0))
    accelerated = accelerate(copy.deepcopy(model))
    with torch.inference_mode():
        torch.testing.assert_close(accelerated(ids).logits, model(ids).logits)


def test_attention_masks_of_every_form_agree() -> None:
    model = tiny_model()
    accelerated = accelerate(copy.deepcopy(model))
    arrays = make_inputs(Case(2, 21, "scattered", "right"))
    ids, mask, marks = (torch.from_numpy(array) for array in arrays.values())
    embedded = model.embeddings.word_embeddings(ids)
    for inputs in (
        {"input_ids": ids},
        {"input_ids": ids, "attention_mask": mask * (1 + marks)},  # 2 = global
        {"input_ids": ids, "attention_mask": mask.float(), "global_attention_mask": marks},
        {"input_ids": ids, "global_attention_mask": marks},
        {"inputs_embeds": embedded, "attention_mask": mask, "global_attention_mask": marks},
        {"input_ids": ids, "position_ids": torch.arange(2, 23)[None].expand(2, -1)},
    ):
        with torch.inference_mode():
            for expected, actual in zip(model(**inputs)[:2], accelerated(**inputs)[:2], strict=True):
                torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("cls", ["LongformerModel", "LEDModel"])
@pytest.mark.parametrize("value", [-1.0, 0.5, 1.5, 3.0])
def test_other_values_in_masks_mean_what_they_mean_to_hugging_face(cls: str, value: float) -> None:
    if cls == "LongformerModel" and not hasattr(modeling_longformer, "create_bidirectional_mask"):
        pytest.skip("this release of transformers, as 5.3 does, reads such values of a Longformer in another way")
    model = tiny_model() if cls == "LongformerModel" else tiny_led(LEDModel).encoder
    accelerated = accelerate(copy.deepcopy(model))
    ids = torch.randint(3, VOCAB_SIZE, (2, 21), generator=torch.Generator().manual_seed(0))
    mask, marks = torch.ones(2, 21), torch.zeros(2, 21)
    mask[0, 5:9], mask[1, 0], marks[1, 3], marks[0, 12] = value, value, 2, value
    for inputs in ({"attention_mask": mask}, {"attention_mask": mask, "global_attention_mask": marks}):
        with torch.inference_mode():
            torch.testing.assert_close(accelerated(ids, **inputs)[0], model(ids, **inputs)[0])


def test_the_outputs_have_hugging_face_s_shapes_and_types() -> None:
    model = tiny_model()
    accelerated = accelerate(copy.deepcopy(model))
    ids = torch.full((2, 21), 5)
    with torch.inference_mode():
        for options in ({}, {"output_hidden_states": True}, {"return_dict": False}):
            expected, actual = model(ids, **options), accelerated(ids, **options)
            assert type(actual) is type(expected)
            assert shapes(actual) == shapes(expected)
        for one, other in zip(
            model(ids, output_hidden_states=True).hidden_states,
            accelerated(ids, output_hidden_states=True).hidden_states,
            strict=True,
        ):
            torch.testing.assert_close(other, one)


def shapes(outputs: Any) -> Any:
    """The shapes in a model's outputs."""
    if isinstance(outputs, torch.Tensor):
        return tuple(outputs.shape)
    items = outputs.values() if hasattr(outputs, "values") else outputs
    return [None if item is None else shapes(item) for item in items]


def test_the_order_of_a_batch_changes_no_bit() -> None:
    accelerated = accelerate(tiny_model())
    arrays = make_inputs(Case(4, 37, "ragged", "right"))
    order = np.array([2, 0, 3, 1])
    together = runner(accelerated)(arrays)
    moved = runner(accelerated)({name: array[order] for name, array in arrays.items()})
    for name, array in together.items():
        np.testing.assert_array_equal(moved[name], array[order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_the_derived_tolerance(dtype: torch.dtype) -> None:
    model = tiny_model()
    precision = "fp16" if dtype == torch.float16 else "bf16"
    report = compare(
        quick_cases(WINDOW, 128),
        make_inputs,
        reference=reference_runner(model),
        witness=torch_runner(model, precision),
        candidate=runner(accelerate(copy.deepcopy(model).to(dtype))),
        precision=precision,
        layers=2,
    )
    report.require()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", ["LongformerModel", "LEDModel"])
def test_autocast_is_within_the_tolerance_of_its_type(cls: str, dtype: torch.dtype) -> None:
    model = tiny_model() if cls == "LongformerModel" else tiny_led(LEDModel)
    accelerated = accelerate(copy.deepcopy(model))

    def under_autocast(module: nn.Module) -> Runner:
        def run(inputs: Arrays) -> Arrays:
            with torch.autocast("cpu", dtype=dtype):
                return runner(module)(inputs)

        return run

    report = compare(
        quick_cases(WINDOW, 128),
        make_inputs,
        reference=runner(copy.deepcopy(model).double()),
        witness=under_autocast(model),
        candidate=under_autocast(accelerated),
        precision="fp16" if dtype == torch.float16 else "bf16",
        layers=3,
        names=("Hugging Face in float64", "Hugging Face under autocast"),
    )
    report.require()


class InFloat32(nn.Module):
    """A projection whose result is float32 under autocast, as that of a norm on a GPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The projection."""
        projected: torch.Tensor = self.linear(hidden).float()
        return projected


@pytest.mark.parametrize("names", [["query"], ["key", "value"], ["query_global"], ["key_global"]], ids="+".join)
def test_projections_may_have_types_of_their_own_under_autocast(names: list[str]) -> None:
    model = tiny_model()
    for layer in model.encoder.layer:
        for name in names:
            setattr(layer.attention.self, name, InFloat32(getattr(layer.attention.self, name)))
    accelerated = accelerate(copy.deepcopy(model))
    ids = torch.randint(3, VOCAB_SIZE, (2, 21), generator=torch.Generator().manual_seed(0))
    marks = (torch.arange(21) < 2).long().expand(2, -1)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = (m(ids, global_attention_mask=marks)[0] for m in (model, accelerated))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.1)


class WrappedWeight(torch.Tensor):
    """A wrapper of a tensor, such as a quantized weight of torchao: it has a product, and no view."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        """A tensor without memory of its own."""
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> Any:
        return WrappedWeight(inner["inner"])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            return function(args[0], args[1].inner, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(str(function))


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_that_wrap_a_tensor_are_not_read_but_called(compiled: bool) -> None:
    torch._dynamo.reset()
    expected, model = one_layer(), one_layer()
    for layer in model.longformer.encoder.layer:
        for projection in (layer.attention.self.key_global, layer.attention.self.value_global):
            projection.weight = nn.Parameter(WrappedWeight(projection.weight.detach()), requires_grad=False)
    accelerate(model, max_global=4)
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    torch.testing.assert_close(classify(run, 2, 21, 2), classify(expected, 2, 21, 2))


def test_the_export_refuses_weights_that_wrap_a_tensor(tmp_path: Any) -> None:
    model = tiny_model()
    dense = model.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(WrappedWeight(dense.weight.detach()), requires_grad=False)
    with pytest.raises(ExportError, match=r"output.dense.weight is a WrappedWeight, .* before it was quantized"):
        export(model, tmp_path / "bundle")


# ---- LED ----------------------------------------------------------------------------------------------------------


def tiny_led(cls: Any) -> Any:
    """A random LED of two layers with different windows, in eval mode."""
    torch.manual_seed(0)
    config = LEDConfig(
        vocab_size=VOCAB_SIZE,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_encoder_position_embeddings=128,
        max_decoder_position_embeddings=32,
        attention_window=[8, 16],
        init_std=0.2,
    )
    return cls(config).eval()


@pytest.mark.parametrize("cls", [LEDModel, LEDForConditionalGeneration, LEDForQuestionAnswering])
def test_led_agrees_with_hugging_face(cls: Any) -> None:
    model = tiny_led(cls)
    accelerated = accelerate(copy.deepcopy(model))
    report = compare(
        full_cases(WINDOW, 128)[::3],
        lambda case: {**make_inputs(case), "decoder_input_ids": np.full((case.batch, 3), 7)},
        reference=runner(copy.deepcopy(model).double()),
        witness=runner(model),
        candidate=runner(accelerated),
        precision="fp32",
        layers=3,
        names=("Hugging Face in float64", "Hugging Face"),
    )
    report.require()


def test_led_generates_what_hugging_face_does() -> None:
    model = tiny_led(LEDForConditionalGeneration)
    accelerated = accelerate(copy.deepcopy(model))
    ids = torch.randint(3, VOCAB_SIZE, (2, 21), generator=torch.Generator().manual_seed(0))
    marks = torch.zeros_like(ids)
    marks[:, 0] = 1
    options = {"global_attention_mask": marks, "max_new_tokens": 8, "num_beams": 2}
    assert torch.equal(accelerated.generate(ids, **options), model.generate(ids, **options))


# ---- torch.compile ------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing that other tests compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_layer(task: str = "text-classification") -> Any:
    """A model of one layer."""
    return tiny_model(task, num_hidden_layers=1, attention_window=[8])


def classify(model: nn.Module, batch: int, seqlen: int, globals_: int) -> torch.Tensor:
    """The logits of random ids, whose first tokens are global."""
    generator = torch.Generator().manual_seed(seqlen)
    ids = torch.randint(3, VOCAB_SIZE, (batch, seqlen), generator=generator)
    mask, marks = torch.ones_like(ids), torch.zeros_like(ids)
    mask[-1, seqlen // 2 :], marks[:, :globals_] = 0, 1
    with torch.inference_mode():
        logits: torch.Tensor = model(ids, attention_mask=mask, global_attention_mask=marks).logits
    return logits


def check_compiled(backend: Any, counter: Any) -> None:
    """Compile a model into one graph, and run it at several lengths, numbers of globals and batch sizes."""
    model = one_layer()
    compiled = torch.compile(accelerate(copy.deepcopy(model), max_global=4), fullgraph=True, backend=backend)
    for seqlen, globals_ in ((33, 1), (40, 0), (57, 4), (16, 2), (100, 3), (7, 1)):
        torch.testing.assert_close(classify(compiled, 2, seqlen, globals_), classify(model, 2, seqlen, globals_))
    assert counter.frame_count == 2  # for the first length, and for all others


@pytest.mark.slow
def test_with_a_fixed_number_of_slots_all_lengths_share_one_graph(fresh_dynamo: None) -> None:
    counter = CompileCounter()
    check_compiled(counter, counter)


@pytest.mark.full_size
@pytest.mark.slow
def test_inductor_compiles_the_model(fresh_dynamo: None) -> None:
    counter = CompileCounterWithBackend("inductor")
    check_compiled(counter, counter)


def test_more_globals_than_slots_are_an_error(fresh_dynamo: None) -> None:
    model = accelerate(one_layer(), max_global=4)
    with pytest.raises(InputError, match="a row has more than max_global=4 global tokens; accelerate with a larger"):
        classify(model, 2, 33, 5)
    with pytest.raises(RuntimeError, match="a row has more than max_global=4 global tokens"):
        classify(torch.compile(model, fullgraph=True, backend="eager"), 2, 33, 5)
    with pytest.raises(InputError, match="a row has more than max_global=0 global tokens"):
        classify(accelerate(model, max_global=0), 2, 33, 1)


@pytest.mark.parametrize("max_global", [0, 4])
def test_a_fixed_number_of_slots_reads_nothing_back(max_global: int) -> None:
    model = accelerate(one_layer(), max_global=max_global).to("meta")  # which has no numbers to read
    ids = torch.ones((2, 33), dtype=torch.int64, device="meta")
    assert model(ids, attention_mask=ids, global_attention_mask=ids).logits.shape == (2, 2)


@pytest.mark.parametrize("max_global", [0, 4])
def test_the_check_of_the_slots_is_an_op_that_a_compiler_neither_fuses_nor_removes(
    max_global: int, fresh_dynamo: None
) -> None:
    targets: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model = accelerate(one_layer(), max_global=max_global)
    classify(torch.compile(model, fullgraph=True, backend=backend), 2, 33, max_global)
    # inductor fuses an assertion into a parallel loop, in which an exception ends the process
    assert any("lfx.at_most" in name for name in targets) and not any("assert_async" in name for name in targets)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=f"a row has more than max_global={max_global} global tokens"):
        classify(torch.compile(model, fullgraph=True, backend="aot_eager"), 2, 33, 5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("max_global", "slots"), [(None, 2), (4, 4)])
def test_a_trace_refuses_more_globals_than_its_slots(max_global: int | None, slots: int) -> None:
    model = one_layer().requires_grad_(False)
    model.config.return_dict = False

    def logits(classifier: nn.Module) -> Any:
        return lambda ids, marks: classifier(ids, global_attention_mask=marks)[0]

    ids = torch.randint(3, VOCAB_SIZE, (2, 21), generator=torch.Generator().manual_seed(0))
    marks = (torch.arange(21) < 2).long().expand(2, -1)
    with torch.no_grad():
        accelerated = accelerate(copy.deepcopy(model), max_global=max_global)
        traced = torch.jit.trace(logits(accelerated), (ids, marks), check_trace=False)
        for count in range(slots + 1):
            marks = (torch.arange(21) < count).long().expand(2, -1)
            torch.testing.assert_close(traced(ids, marks), logits(model)(ids, marks))
        with pytest.raises(RuntimeError, match=f"a row has more than max_global={slots} global tokens"):
            traced(ids, (torch.arange(21) <= slots).long().expand(2, -1))


def test_fewer_tokens_than_slots_are_no_error() -> None:
    model = one_layer()
    actual = classify(accelerate(copy.deepcopy(model), max_global=64), 2, 3, 2)
    torch.testing.assert_close(actual, classify(model, 2, 3, 2))


# ---- what stays, and what is refused ------------------------------------------------------------------------------


def test_the_model_is_changed_in_place_and_keeps_its_weights_and_names(tmp_path: Any) -> None:
    model = tiny_model()
    names, first = list(model.state_dict()), next(model.parameters())
    accelerated = accelerate(model, max_global=3)
    assert accelerated is model and next(model.parameters()) is first
    assert list(model.state_dict()) == names
    assert accelerate(model, max_global=5).encoder.layer[0].attention.self.max_global == 5
    ids = torch.full((1, 9), 5)
    with torch.inference_mode():
        expected = model(ids).last_hidden_state
        model.save_pretrained(tmp_path)
        loaded = LongformerModel.from_pretrained(tmp_path)
        assert type(loaded) is LongformerModel and loaded.config.architectures == ["LongformerModel"]
        torch.testing.assert_close(loaded(ids).last_hidden_state, expected)
        assert torch.equal(copy.deepcopy(model)(ids).last_hidden_state, expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids).last_hidden_state, expected)


def test_chunks_of_the_feed_forward_layer_do_not_limit_the_length() -> None:
    model = tiny_model(chunk_size_feed_forward=16)
    ids = torch.full((1, 21), 5)
    with torch.inference_mode():
        expected = model(ids).last_hidden_state
        torch.testing.assert_close(accelerate(model)(ids).last_hidden_state, expected)


def test_projections_that_are_not_plain_are_called() -> None:
    model = tiny_model()
    for layer in model.encoder.layer:
        layer.attention.self.key_global = nn.Sequential(layer.attention.self.key_global, nn.Tanh())
    arrays = make_inputs(Case(2, 21, "scattered"))
    actual = runner(accelerate(copy.deepcopy(model)))(arrays)
    for name, expected in runner(model)(arrays).items():
        np.testing.assert_allclose(actual[name], expected, atol=1e-5)


class ByPosition(nn.Module):
    """A user's projection that depends on the position, which is the first axis in Hugging Face's attention."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Project, and scale by the position."""
        positions = torch.arange(len(hidden), dtype=hidden.dtype)
        scaled: torch.Tensor = self.linear(hidden) * (1 + 0.1 * positions)[:, None, None]
        return scaled


@pytest.mark.parametrize("name", ["query", "key", "value", "query_global", "key_global", "value_global"])
@pytest.mark.parametrize("cls", ["LongformerModel", "LEDModel"])
def test_a_projection_that_depends_on_the_position_gets_hugging_face_s_axes(cls: str, name: str) -> None:
    model = tiny_model() if cls == "LongformerModel" else tiny_led(LEDModel)
    layers = model.encoder.layer if cls == "LongformerModel" else model.encoder.layers
    for layer in layers:
        attention = layer.attention.self if cls == "LongformerModel" else layer.self_attn.longformer_self_attn
        setattr(attention, name, ByPosition(getattr(attention, name)))
    arrays = make_inputs(Case(2, 21, "scattered"))
    actual = runner(accelerate(copy.deepcopy(model)))(arrays)
    for output, expected in runner(model)(arrays).items():
        np.testing.assert_allclose(actual[output], expected, atol=1e-4)


class Own(nn.Module):
    """A user's module with Longformer's self-attention, which is given Hugging Face's mask."""

    def __init__(self, cls: type[LongformerSelfAttention] = LongformerSelfAttention) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = cls(tiny_config(initializer_range=0.5), 0)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute the context."""
        marks = mask > 0
        context: torch.Tensor = self.attention(hidden, mask, mask < 0, marks, bool(marks.any()))[0]
        return context


class Scaled(LongformerSelfAttention):  # type: ignore[misc]
    """A user's subclass with a method of its own."""

    def factor(self) -> int:
        """Any number."""
        return 3


@pytest.mark.parametrize("cls", [LongformerSelfAttention, Scaled])
def test_self_attention_in_a_module_of_one_s_own_is_accelerated(cls: Any) -> None:
    model = Own(cls).eval()
    hidden, mask = torch.randn(2, 24, 32), torch.zeros(2, 24)
    mask[0, [3, 9]], mask[1, 20:] = 10000.0, -10000.0
    with torch.inference_mode():
        expected = model(hidden, mask)
        accelerated = accelerate(model)
        torch.testing.assert_close(accelerated(hidden, mask), expected)
        assert accelerated(hidden[:, :21], mask[:, :21]).shape == (2, 21, 32)  # no multiple of the window
        copied = pickle.loads(pickle.dumps(accelerated))
        assert type(copied.attention) is type(model.attention)
        assert torch.equal(copied(hidden, mask), accelerated(hidden, mask))
    if cls is Scaled:
        assert isinstance(model.attention, Scaled) and model.attention.factor() == 3


class OwnEncoder(LongformerEncoder):  # type: ignore[misc]
    """A user's encoder with a forward of its own."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """That of the parent."""
        return super().forward(*arguments, **options)


class Causal(LongformerSelfAttention):  # type: ignore[misc]
    """A user's attention with a mask of its own."""

    def _mask_invalid_locations(self, input_tensor: torch.Tensor, affected_seq_len: int) -> None:
        super()._mask_invalid_locations(input_tensor, affected_seq_len)
        input_tensor[..., affected_seq_len + 1 :] = torch.finfo(input_tensor.dtype).min


class MarksGlobals(LongformerModel):  # type: ignore[misc]
    """A user's model with global tokens of its own."""

    def _merge_to_attention_mask(self, *masks: torch.Tensor) -> torch.Tensor:
        return super()._merge_to_attention_mask(*masks) * 2


def test_a_method_of_one_s_own_that_would_not_be_called_is_refused() -> None:
    model = tiny_model()
    model.encoder.layer[1].attention.self.__class__ = Causal
    with pytest.raises(InputError, match="Causal has a _mask_invalid_locations of its own"):
        accelerate(model)
    model = tiny_model()
    model.__class__ = MarksGlobals
    with pytest.raises(InputError, match="MarksGlobals has a _merge_to_attention_mask of its own"):
        accelerate(model)


class GatedLayer(LongformerLayer):  # type: ignore[misc]
    """A user's layer, which treats global tokens apart."""

    def forward(
        self, hidden_states: torch.Tensor, *arguments: Any, is_index_global_attn: Any = None, **rest: Any
    ) -> Any:
        """That of the parent."""
        outputs = super().forward(hidden_states, *arguments, is_index_global_attn=is_index_global_attn, **rest)
        return (
            outputs if is_index_global_attn is None else (outputs[0] + is_index_global_attn[:, :, None], *outputs[1:])
        )


class DroppedIn(nn.Module):
    """A user's module in place of one of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = LongformerSelfAttention(tiny_config(), 0)

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """The hidden states."""
        return (hidden_states,)


def test_a_part_that_the_masks_are_handed_to_must_be_transformers_own() -> None:
    for path in ("encoder.layer.1", "encoder.layer.1.attention", "encoder.layer.1.attention.self", "encoder"):
        model = tiny_model()
        model.set_submodule(path, DroppedIn())
        with pytest.raises(
            InputError, match=r"has a DroppedIn where transformers has a Longformer.*before it is wrapped"
        ):
            accelerate(model)
    model = tiny_model()
    model.encoder.layer[1].__class__ = GatedLayer
    with pytest.raises(
        InputError, match=r"GatedLayer has a forward of its own.*whose LongformerLayer is transformers'"
    ):
        accelerate(model)
    led = tiny_led(LEDModel)
    led.encoder.layers[0].self_attn = DroppedIn()
    with pytest.raises(InputError, match="has a DroppedIn where transformers has a LEDEncoderAttention"):
        accelerate(led)


@pytest.mark.parametrize("cls", ["LongformerModel", "LEDModel"])
def test_a_new_model_of_an_accelerated_class_is_hugging_face_s(cls: str) -> None:
    model = tiny_model() if cls == "LongformerModel" else tiny_led(LEDModel).encoder
    ids, marks = torch.full((2, 21), 5), torch.zeros(2, 21)
    marks[:, 0] = 1
    accelerated = accelerate(copy.deepcopy(model))
    new = type(accelerated)(model.config).eval()
    new.load_state_dict(accelerated.state_dict())
    with torch.inference_mode():
        expected = model(ids, global_attention_mask=marks)[0]
        assert torch.equal(new(ids, global_attention_mask=marks)[0], expected)
        torch.testing.assert_close(accelerate(new)(ids, global_attention_mask=marks)[0], expected)


def test_new_parts_of_accelerated_classes_are_hugging_face_s() -> None:
    model = tiny_model()
    accelerated = accelerate(copy.deepcopy(model))
    ids = torch.full((2, 21), 5)
    for path in ("encoder", "encoder.layer.1.attention.self"):
        part = accelerated.get_submodule(path)
        new = copy.deepcopy(model)
        new.set_submodule(path, type(part)(model.config, *([1] if path.endswith("self") else [])).eval())
        new.load_state_dict(model.state_dict())
        with torch.inference_mode():
            assert torch.equal(new(ids)[0], model(ids)[0])


@pytest.mark.parametrize("part", ["encoder.layer.0.attention.self", "encoder", ""])
def test_a_forward_that_was_set_on_a_module_is_refused(part: str) -> None:
    model = tiny_model()
    module = model.get_submodule(part)
    original = module.forward
    module.forward = original
    with pytest.raises(InputError, match="has a forward of its own, which accelerate cannot replace"):
        accelerate(model)
    del module.forward
    accelerate(model)
    module.forward = original
    with pytest.raises(InputError, match="has a forward of its own, which accelerate cannot replace"):
        accelerate(model)


def test_what_is_no_longformer_for_inference_is_refused() -> None:
    for model, message in (
        (nn.Linear(2, 2), "Linear has no Longformer self-attention; give a Longformer or LED"),
        ("longformer", "model is str; give a Longformer or LED of transformers"),
        (use_loop_attention(tiny_model()), "has a forward of its own, which accelerate cannot replace"),
    ):
        with pytest.raises(InputError, match=message):
            accelerate(model)  # type: ignore[type-var]
    model = tiny_model()
    model.encoder.__class__ = OwnEncoder
    with pytest.raises(InputError, match="OwnEncoder has a forward of its own"):
        accelerate(model)
    assert type(model.encoder.layer[0].attention.self) is LongformerSelfAttention  # nothing is changed
    for count in (-1, True, "3"):
        with pytest.raises(InputError, match="max_global"):
            accelerate(tiny_model(), max_global=count)  # type: ignore[arg-type]


def test_the_loop_and_the_export_refuse_an_accelerated_model(tmp_path: Any) -> None:
    """Their attention would not be called."""
    for model in (accelerate(tiny_model(attention_dilation=2)), accelerate(tiny_led(LEDModel).encoder)):
        with pytest.raises(ExportError, match=r"the model is accelerated: .*before accelerate\(model\)"):
            use_loop_attention(model)
    for model in (tiny_model(), tiny_led(LEDForConditionalGeneration)):
        with pytest.raises(ExportError, match=r"the model is accelerated: .*which changes a model in place"):
            export(accelerate(model), tmp_path / "bundle")


def test_attention_weights_and_training_are_refused_in_one_line() -> None:
    for model in (accelerate(tiny_model()), accelerate(tiny_led(LEDModel))):
        ids = torch.full((1, 9), 5)
        with pytest.raises(InputError, match="stores no attention weights; leave output_attentions out"):
            model(ids, output_attentions=True)
        model.train()
        with pytest.raises(InputError, match=r"runs inference alone; call model.eval\(\) first"):
            model(ids)
        model.eval()
        with pytest.raises(InputError, match="the lfx ops compute no gradients"):
            model(ids)[0].sum().backward()
