"""A model that does not fit is scored layer by layer, in one pass and with equal digits."""

import math
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.cards import status
from benchmarks.random_models import config_of
from stages.evaluate import evaluate
from stages.evaluating import generation
from stages.evaluating.answers import answered
from stages.evaluating.generation import Room, answers, forecast
from stages.planning.scoring import decoder_of
from stages.quantize import quantize
from stages.shared import by_layer, scored_model, streaming
from stages.shared.fitting import TOKENS_PER_BATCH, fit, scored, tightest
from stages.shared.host_memory import LOCKING_THREADS, HostBuffers
from stages.shared.model import load_base, load_streamed
from stages.shared.outputs import GB
from stages.shared.params import Evaluate
from stages.shared.placement import SLOTS
from stages.shared.rows import length_batches
from stages.shared.scored_model import decoder_in, load_to_score, model_sizes
from stages.shared.scoring import score
from stages.shared.vram import CARDS_GB
from stages.shared.weights import SINGLE, Weights
from stages.shared.workload import read_model, shape_of
from tests.test_fast_path import with_random_adapter
from tests.test_scoring import make_rows
from tests.tiny import make_model, make_tokenizer

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LAYERS, TOKENS = 4, 64
ROWS = make_rows()
# Masks and rotary embeddings of two kinds, ALiBi, layers that keep a state or return tuples.
FAMILIES = ["llama", "gemma2", "gemma3_text", "bloom", "gpt_neox", "recurrent_gemma"]


@pytest.fixture(autouse=True)
def small_weights(monkeypatch):
    monkeypatch.setattr(streaming, "SMALLEST", 1024)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A llama, in 16 bit and in NF4, with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    make_model(folder / "base", num_hidden_layers=LAYERS)
    make_tokenizer(folder / "base")
    (folder / "nf4").mkdir()
    quantize(folder / "base", folder / "nf4", double_quant=True)
    return folder


def streamed(folder, count=LAYERS, slots=1):
    return load_streamed(folder, CPU, count, "files", slots=slots)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_over_the_weights_gives_the_same_digits(family, tmp_path):
    make_model(tmp_path, family, num_hidden_layers=LAYERS)
    expected = score(load_base(tmp_path, CPU), ROWS, TOKENS)
    assert len(length_batches(ROWS, TOKENS)) > LAYERS
    # Hidden states may wait on the device, or must in host memory.
    for room in (GB, 0.0):
        model, streamer = streamed(tmp_path)
        streamer.room = room
        assert score(model, ROWS, TOKENS, streamer=streamer) == expected
        assert streamer.sent == LAYERS
    # Also batch by batch, as some families require.
    assert score(model, ROWS, TOKENS) == expected
    assert streamer.sent == LAYERS * (1 + len(length_batches(ROWS, TOKENS)))


@pytest.mark.parametrize("kind", ["base", "nf4"])
def test_experts_go_through_layer_by_layer_too(kind, tmp_path):
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    make_model(tmp_path / "base", "qwen3_moe", num_hidden_layers=LAYERS, **settings)
    if kind == "nf4":
        (tmp_path / "nf4").mkdir()
        quantize(tmp_path / "base", tmp_path / "nf4", double_quant=True)
    expected = score(load_base(tmp_path / kind, CPU), ROWS, TOKENS)
    model, streamer = streamed(tmp_path / kind)
    assert score(model, ROWS, TOKENS, streamer=streamer) == expected
    assert streamer.sent == LAYERS


@pytest.mark.parametrize("kind", ["base", "nf4"])
def test_base_and_tuned_stream_once_each(folders, kind):
    found = []
    for by in (False, True):
        model, streamer = streamed(folders / kind) if by else (load_base(folders / kind, CPU), None)
        peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        rows = [row | {"scored_bytes": 9} for row in ROWS]
        found.append(evaluate(with_random_adapter(peft), {"": rows}, streamer=streamer)[:2])
    assert found[0] == found[1]
    assert streamer.sent == 2 * LAYERS


def test_hidden_states_in_host_memory_leave_the_device(folders):
    """The bytes that the batches keep on the device between two layers."""
    model, streamer = streamed(folders / "base")
    rows = torch.tensor([row["input_ids"][:4] for row in ROWS[:2]])
    inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    layers = streaming.decoder_layers(model)
    with torch.no_grad():
        for room, kept in ((GB, 2 * 4 * model.config.hidden_size * 4), (0.0, 0)):
            batch = by_layer._Batch(model, layers, inputs, [])
            if not room:
                batch.leave(streamer.buffers, None, [])
            batch.compute(layers[1], 1)
            assert batch.hidden.untyped_storage().nbytes() == kept


class Lagging:
    """A CUDA stream that begins a copy only when another one waits for its end."""

    def __init__(self):
        self.begun, self.copies, self.copy = 0, [], torch.Tensor.copy_

    def wait_stream(self, other):
        """The other one, which computes, has ended."""

    def record_event(self):
        return len(self.copies)

    def end(self, event=None):
        for to, source in self.copies[self.begun : event]:
            # Fails if the source was freed before.
            self.copy(to, source())
            self.begun += 1

    @contextmanager
    def current(self, *_):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", lambda *pair, non_blocking: self._add(*pair))
            yield

    def _add(self, to, source):
        self.copies.append((to, weakref.ref(source)))


@pytest.fixture
def copies(monkeypatch):
    """(a stream of copies, a list of the synchronizations) for a CPU."""
    copies, ends = Lagging(), []
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(wait_event=copies.end)
    )
    monkeypatch.setattr(torch.cuda, "stream", copies.current)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: ends.append(copies.end()))
    return copies, ends


def inputs_of(widths):
    ids = [torch.arange(3, 3 + width)[None] for width in widths]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


@pytest.mark.parametrize(
    ("widths", "room", "leave", "move"),
    [
        # Room in hidden states of 8 tokens, which arguments make 1.5 times as large.
        ([8], 2, 0, False),
        ([8, 8], 3.5, 0, False),
        ([8, 8, 8], 2.5, 3, True),
        ([8, 8, 8], 3.6, 2, True),
        ([8, 8, 8], 1.9, 2, False),
        # The largest comes last.
        ([4, 8, 8], 1.9, 2, False),
    ],
)
def test_who_leaves_the_device_and_who_moves_meanwhile(
    folders, copies, monkeypatch, widths, room, leave, move
):
    model, streamer = streamed(folders / "base")
    expected = [model.base_model(**x).last_hidden_state for x in inputs_of(widths)]
    (streamer.copies, ends), gone = copies, []
    streamer.room = room * 8 * model.config.hidden_size * 4
    own = by_layer._Batch.leave

    def noting(self, buffers, copies, ahead):
        gone.append((copies, ahead))
        own(self, buffers, copies, ahead)

    monkeypatch.setattr(by_layer._Batch, "leave", noting)
    found = list(by_layer.last_hidden_states(model, inputs_of(widths), streamer))
    assert all(map(torch.equal, found, expected))
    assert len(gone) == leave
    assert all((one is not None) == move for one, _ in gone)
    # The first asks for all.
    assert [len(ahead) for _, ahead in gone] == [leave, 0, 0][:leave]
    # There and back after each layer.
    assert len(streamer.copies.copies) == (2 * LAYERS * leave if move else 0)
    assert len(ends) == 1


def test_an_abandoned_pass_waits_for_its_copies(folders, copies):
    model, streamer = streamed(folders / "base")
    streamer.copies, _ = copies
    streamer.room = 2.5 * 8 * model.config.hidden_size * 4
    states = by_layer.last_hidden_states(model, inputs_of([8, 8]), streamer)
    next(states)
    assert streamer.copies.begun < len(streamer.copies.copies)
    states.close()
    assert streamer.copies.begun == len(streamer.copies.copies)


def test_a_hidden_state_that_is_read_before_it_arrives_is_seen(folders, copies, monkeypatch):
    """As on a GPU, tests/test_gpu_placement.py."""
    expected = score(load_base(folders / "base", CPU), ROWS, TOKENS)
    model, streamer = streamed(folders / "base")
    streamer.copies, _ = copies
    streamer.room = 2.5 * TOKENS * model.config.hidden_size * 4
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a: new_empty(*a).fill_(math.nan))
    assert score(model, ROWS, TOKENS, streamer=streamer) == expected
    monkeypatch.setattr(by_layer, "wait_for", lambda _: None)
    assert any(map(math.isnan, score(model, ROWS, TOKENS, streamer=streamer).nll))


def test_buffers_in_host_memory_are_used_again(folders, monkeypatch):
    expected = score(load_base(folders / "base", CPU), ROWS, TOKENS)
    model, streamer = streamed(folders / "base")
    assert score(model, ROWS, TOKENS, streamer=streamer) == expected
    first = {buffer.result().data_ptr() for _, buffer in streamer.buffers.free}
    assert len(first) == len(length_batches(ROWS, TOKENS))
    assert score(model, ROWS, TOKENS, streamer=streamer) == expected
    assert {buffer.result().data_ptr() for _, buffer in streamer.buffers.free} == first


def test_a_larger_buffer_takes_the_place_of_a_smaller_one():
    buffers = HostBuffers(gpu=False)
    for size in (4, 16):
        buffers.put(torch.empty(size, dtype=torch.uint8))
    assert buffers.take(8).nbytes == 16
    assert buffers.take(8).nbytes == 8
    assert buffers.free == []


def test_buffers_asked_for_are_made_once_and_ahead_of_use():
    buffers = HostBuffers(gpu=False)
    buffers.put(torch.empty(6, dtype=torch.uint8))
    buffers.ask([8, 8, 6])
    assert [size for size, _ in buffers.free] == [6, 8, 8]
    made = [made for _, made in buffers.free]
    buffers.ask([8, 6])
    assert [buffers.take(size) for size in (8, 8, 6)] == [made[i].result() for i in (1, 2, 0)]
    assert buffers.free == []


def test_buffers_given_up_are_not_made(monkeypatch):
    buffers, begun, go = HostBuffers(gpu=False), [], threading.Event()

    def made(size):
        begun.append(size)
        go.wait(10)
        if size == 20:
            raise MemoryError("no")
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(buffers, "_made", made)
    buffers.ask([10] * 6)
    buffers.ask([20] * 6)
    go.set()
    with pytest.raises(MemoryError):
        buffers.take(20)
    assert begun.count(10) <= LOCKING_THREADS
    # Once there is memory again.
    monkeypatch.setattr(buffers, "_made", lambda size: torch.empty(size, dtype=torch.uint8))
    buffers.threads.shutdown()
    buffers.threads = ThreadPoolExecutor(1)
    buffers.cancel()
    assert buffers.take(20).nbytes == 20


def test_batches_beyond_the_room_take_another_pass(folders, monkeypatch):
    expected = score(load_base(folders / "base", CPU), ROWS, TOKENS)
    model, streamer = streamed(folders / "base")
    # Two or three batches: the hidden states of 64 tokens, their masks and positions.
    monkeypatch.setattr(by_layer, "CHUNK_BYTES", 3 * TOKENS * 64 * 4)
    assert score(model, ROWS, TOKENS, streamer=streamer) == expected
    batches = len(length_batches(ROWS, TOKENS))
    assert 1 < streamer.sent / LAYERS < batches
    monkeypatch.setattr(by_layer, "CHUNK_BYTES", 1)
    assert score(model, ROWS, TOKENS, streamer=streamer) == expected


def between(model, hidden):
    named = positions(model, hidden)
    for layer in model.layers:
        hidden = layer(1.5 * hidden, **named)
    return hidden


def above(model, hidden):
    named, total = positions(model, hidden), 0
    for layer in model.layers:
        hidden = layer(hidden, **named)
        total = total + hidden
    return total


def beside(model, hidden):
    for layer in model.layers:
        hidden = layer(hidden, **positions(model, hidden, shift=hidden.mean()))
    return hidden


def fewer(model, hidden):
    named = positions(model, hidden)
    for layer in model.layers[:-1]:
        hidden = layer(hidden, **named)
    return hidden


def positions(model, hidden, shift=0):
    cos, sin = model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    return {"position_embeddings": (cos + shift, sin), "attention_mask": None}


@pytest.mark.parametrize("forward", [between, above, beside, fewer])
def test_a_family_that_needs_more_is_named_and_streams_for_each_batch(
    folders, forward, monkeypatch, capsys
):
    found = []
    for model, streamer in ((load_base(folders / "base", CPU), None), streamed(folders / "base")):
        inner = model.model

        def run(input_ids, inner=inner, **_):
            hidden = forward(inner, inner.embed_tokens(input_ids))
            return SimpleNamespace(last_hidden_state=inner.norm(hidden))

        monkeypatch.setattr(inner, "forward", run)
        found.append(score(model, ROWS, TOKENS, streamer=streamer))
    assert found[0] == found[1]
    said = capsys.readouterr().out
    assert said.startswith("llama: its ")
    assert f"streaming all weights for each of {len(length_batches(ROWS, TOKENS))} batches" in said
    assert streamer.sent > LAYERS
    # Once is enough.
    score(model, ROWS, TOKENS, streamer=streamer)
    assert capsys.readouterr().out == ""


def test_a_family_without_a_list_of_layers_is_one_layer(folders, monkeypatch, capsys):
    expected = score(load_base(folders / "base", CPU), ROWS, TOKENS)

    def none(model):
        raise ValueError(f"{type(model).__name__} has no list of layers")

    for module in (streaming, by_layer):
        monkeypatch.setattr(module, "decoder_layers", none)
    model, streamer = streamed(folders / "base")
    assert streamer.count == 1
    assert score(model, ROWS, TOKENS, streamer=streamer) == expected
    assert "LlamaForCausalLM has no list of layers" in capsys.readouterr().out


@pytest.mark.parametrize("shift", [1, 2, 4, 32])
@pytest.mark.parametrize("kind", ["base", "nf4"])
def test_where_a_file_has_its_tensors_changes_no_digit(folders, kind, shift, tmp_path):
    """A mapped tensor may begin at any byte."""
    for file in (folders / kind).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (folders / kind / SINGLE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    length = (size + shift).to_bytes(8, "little")
    (tmp_path / SINGLE).write_bytes(length + data[8 : 8 + size] + b" " * shift + data[8 + size :])
    found = []
    for folder in (folders / kind, tmp_path):
        model, streamer = streamed(folder)
        found.append(score(model, ROWS, TOKENS, streamer=streamer))
    assert found[0] == found[1]


def test_weights_stay_in_their_files(tmp_path):
    """Memory holds 1 of 16 layers."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    make_model(tmp_path, **shape)
    layer = 4 * (3 * 512 * 2048)
    before = status("RssAnon")
    model, streamer = streamed(tmp_path, 16)
    score(model, ROWS, streamer=streamer)
    assert status("RssAnon") - before < 5 * layer
    assert streamer.bytes > 16 * layer


def test_a_model_that_does_not_fit_is_streamed(folders, monkeypatch, capsys, tmp_path):
    folder = folders / "nf4"
    sizes = model_sizes(folder, 40, CPU)
    for free, whole in ((100 * GB, True), (0.5 * GB, False)):
        monkeypatch.setattr(scored_model, "available_bytes", lambda free=free: free)
        _, streamer = load_to_score("evaluate", folder, sizes, CPU)
        said = capsys.readouterr().out
        assert (streamer is None) == whole
        assert ("of the machine's memory are free: streaming 4 of 4 layers" in said) != whole
    assert streamer.count == LAYERS


def test_streamed_answers_are_the_same_and_their_time_is_said(folders, capsys):
    tokenizer = make_tokenizer(folders / "tokenizer")
    sets = {"": [row | {"prompt_tokens": 4, "scored_bytes": 9} for row in ROWS[:6]]}
    asked = Evaluate(samples=6, max_answer_tokens=5, measures=[])
    sizes, found = model_sizes(folders / "nf4", 40, CPU), []
    for by in (False, True):
        model, streamer = (
            streamed(folders / "nf4") if by else (load_base(folders / "nf4", CPU), None)
        )
        peft = with_random_adapter(get_peft_model(model, LoraConfig(r=4)))
        room = Room(streamer, sizes) if by else None
        before = streamer.sent if by else 0
        found.append(answered(peft.eval(), tokenizer, sets, asked, [2], room))
    assert found[0] == found[1]
    [said] = [line for line in capsys.readouterr().out.splitlines() if "answered" in line]
    assert "6 prompts are answered 6 at once; each token streams 0.0 GB" in said
    assert "fewer samples take as long, evaluate.samples: 0 none" in said
    # Every token of the batch of each model, and what was measured.
    tokens = [max(one.answers[who].tokens for one in found[1]) for who in ("base", "tuned")]
    passes = (streamer.sent - before) / LAYERS
    assert sum(tokens) + 1 <= passes <= sum(tokens) + 3


def test_long_prompts_are_read_in_chunks_so_that_all_are_answered_at_once(folders, monkeypatch):
    tokenizer, limit, width = make_tokenizer(folders / "tokenizer"), 5, 30
    prompts = [[3 + (7 * i + j) % 40 for j in range(width - i)] for i in range(4)]
    expected = answers(load_base(folders / "base", CPU), tokenizer, prompts, [2], limit)
    monkeypatch.setattr(generation, "CHUNK_TOKENS", 8)
    model, streamer = streamed(folders / "base")
    # Beside the KV cache there is memory for 4 x 9 tokens.
    sizes = SimpleNamespace(working=4 * 35 + 4 * 9, dequantized=0, token=1, cached=1)
    room, before = Room(streamer, sizes), streamer.sent
    assert answers(model, tokenizer, prompts, [2], limit, room) == expected
    longest = max(answer.tokens + answer.ended for answer in expected)
    assert (streamer.sent - before) / LAYERS == math.ceil(width / 9) + longest - 1
    assert room.passes(4, width, limit) == math.ceil(width / 9) + limit - 1
    # A model with a state of its own reads a prompt at once: two rows of 35 and 30 tokens fit.
    whole = Room(streamer, sizes, in_chunks=False)
    assert [len(batch) for batch in generation._batches(prompts, whole, limit)] == [2, 2]


def test_what_fewer_samples_would_save_is_said(monkeypatch):
    streamer = SimpleNamespace(room=0.0, bytes=34.2 * GB, pass_seconds=lambda: 1.5)
    room = Room(streamer, SimpleNamespace(working=90.0, dequantized=30.0, token=0.5, cached=0.5))
    said = forecast([[0] * 10] * 6, 40, room)
    # Two rows of 50 tokens at once, in three batches, by two models.
    assert "6 prompts are answered 2 at once; each token streams 34.2 GB in about 1.5 s" in said
    assert "at most 6 minutes for 40 tokens of both models; evaluate.samples: 2 would" in said
    assert said.endswith("take at most 2")


@pytest.mark.parametrize("kind", ["base", "nf4"])
def test_files_and_configuration_tell_the_same_of_a_model(folders, kind):
    """plan predicts from the config what a stage reads from the weights."""
    _, shape = read_model(folders / kind)
    assert decoder_in(Weights(folders / kind)) == decoder_of(shape)


@pytest.mark.parametrize("name", ["mistral-7b", "llama-2-70b"])
@pytest.mark.parametrize("nf4", [True, False])
def test_what_is_streamed_fits_the_card(name, nf4):
    model = scored(decoder_of(shape_of(config_of(name))), nf4, True, 2048, 0.1 * GB)
    streams = []
    for card in CARDS_GB:
        found = fit(model, card * GB)
        if found is None:
            assert tightest(model).needed > card * GB
            continue
        assert found.needed <= card * GB
        streams.append(found.streamed)
        on_card = model.weights - (found.streamed - found.slots) * model.layer
        assert found.needed > on_card + model.working
        assert found.slots <= SLOTS
        if found.streamed:
            # One layer fewer would not fit, or leave no room for hidden states that move.
            moving = model.moving if found.slots > 1 else 0
            assert found.needed + moving <= card * GB < found.needed + model.layer + moving
    assert streams == sorted(streams, reverse=True)
    assert streams[0] > streams[-1]


def test_a_card_of_6_gb_scores_a_70b_model_and_its_merge_layer_by_layer():
    """At eight layers, so that the constants of NF4 are few."""
    config = config_of("llama-2-70b")
    config.num_hidden_layers = 8
    for nf4 in (True, False):
        model = scored(decoder_of(shape_of(config)), nf4, True, 2048, 0.0)
        found = fit(model, 6 * GB)
        assert found.streamed
        # Hidden states can move while others are computed.
        assert 6 * GB - found.needed > model.moving == 2 * 2 * 4096 * 8192
        # Rows beyond a batch take more.
        longer = scored(decoder_of(shape_of(config)), nf4, True, 2 * TOKENS_PER_BATCH, 0.0)
        assert longer.working > 1.5 * model.working
