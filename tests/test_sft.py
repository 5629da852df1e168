"""The fine-tuning recipe as its users meet it: from scratch and on other models, whole and with adapters."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.config import from_json, to_json
from jaxlm.core.log import read_metrics
from jaxlm.core.mesh import make_mesh
from jaxlm.core.tree import named_leaves
from jaxlm.data.chat_examples import ChatFormat, Chats, chat_example, encode_source
from jaxlm.data.chat_template import CHATML, ChatTemplate
from jaxlm.data.conversations import open_conversations
from jaxlm.data.pipeline import whole_batches
from jaxlm.generate.prompts import Prompt, Reader
from jaxlm.model import lora
from jaxlm.model.decoder import build
from jaxlm.model.hf import load_hf
from jaxlm.train.pretrained import load_pretrained, open_pretrained
from jaxlm.train.run import make_loss
from recipes.convert import main as convert
from recipes.sft import PRESETS, Config, check, main
from tests.tiny_chat import MODEL, json_tokenizer, tiny_folder

TINY = ["--model.vocab-size", "300", "--model.d-model", "16", "--model.num-layers", "2", "--model.num-heads", "2",
        "--model.num-kv-heads", "1", "--model.head-dim", "8", "--model.d-ff", "24", "--model.max-positions", "128"]


def rows(count, start=0):
    return [{"messages": [
        {"role": "user", "content": f"What is {i} plus {i}?"},
        {"role": "assistant", "content": f"It is {2 * i}."}] * (1 + i % 3)} for i in range(start, start + count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    for name, part in (("train", rows(40)), ("held_out", rows(6, 40))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def flags(files, folder, steps, *extra):
    return ["--folder", str(folder), "--data.path", f"{files}/train.jsonl",
            "--data.held-out", f"{files}/held_out.jsonl", "--pipeline.batch-size", "8", "--pipeline.seq-len", "96",
            "--pipeline.num-bins", "4", "--loop.log-every", "1", "--loop.eval-every", "100", "--checkpoint.every", "2",
            "--optim.schedule.decay", "0", "--loop.steps", str(steps), "--answers.count", "0", *extra]


def losses(folder):
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


def refused(capfd, *arguments):
    """The error of a command that must fail before it trains."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    out, err = capfd.readouterr()
    assert "step 1/" not in out and "Traceback" not in err
    return re.sub(r"[│\s]+", " ", err)


@pytest.fixture(scope="module")
def scratch(files, tmp_path_factory):
    """A model from random weights, with answers, and the tokenizer of its conversations."""
    folder = tmp_path_factory.mktemp("runs") / "scratch"
    main([*TINY, *flags(files, folder, 6, "--optim.lr", "1e-2", "--answers.count", "2", "--answers.tokens", "4",
                        "--answers.show", "1")])
    return folder


def test_from_scratch(files, scratch, tmp_path):
    """It learns, says how well it answers, keeps its template, and goes on as if it had not stopped."""
    found = losses(scratch)
    assert sorted(found) == [1, 2, 3, 4, 5, 6] and found[6] < 0.9 * found[1]
    evaluated = next(r for r in read_metrics(scratch / "metrics.jsonl") if "eval/loss_held_out" in r)
    assert 0 < evaluated["eval/loss_held_out"] < 6 and 0 <= evaluated["eval/exact_held_out"] <= 1
    opened = open_pretrained(scratch)
    assert opened.tokenizer.eos_id == opened.tokenizer.token_id("<|im_end|>")
    reader = Reader(opened.tokenizer, opened.start, opened.chat, chat=True)
    ids = reader.ids(Prompt("What is 0 plus 0?"))
    form = ChatFormat(opened.chat, opened.tokenizer)
    assert ids == form.prompt(rows(1)[0]) and ids[0] == opened.tokenizer.bos_id != ids[1]
    cut = [*TINY, *flags(files, tmp_path / "cut", 2, "--optim.lr", "1e-2")]
    main(cut)
    main([*cut, "--resume", "--loop.steps", "6"])
    assert losses(tmp_path / "cut") == found


def test_adapters(files, scratch, tmp_path, capfd):
    """Only adapters move, a resumed run is the same, and what is loaded and exported is merged."""
    run = flags(files, tmp_path / "run", 4, "--init", str(scratch), "--lora.rank", "2", "--lora.kind", "dora")
    main(run)
    err = capfd.readouterr().err
    assert "14.7k parameters, 1.15k of them trained (7.84 %)" in err
    before, after = load_pretrained(scratch), load_pretrained(tmp_path / "run")
    assert after.lora.kind == "dora" and not lora.has_adapters(after.params)
    for path, leaf in named_leaves(after.params).items():
        moved = not np.allclose(leaf, named_leaves(before.params)[path], rtol=0, atol=1e-6)
        assert moved == (path.startswith("layers/") and path.endswith("kernel")), path
    convert(["--source", str(tmp_path / "run"), "--target", str(tmp_path / "hf")])
    exported = load_hf(tmp_path / "hf")[1]
    jax.tree.map(np.testing.assert_array_equal, exported, jax.device_get(after.params))
    assert "<|im_start|>" in (tmp_path / "hf/chat_template.jinja").read_text()
    cut = [*run[:1], str(tmp_path / "cut"), *run[2:]]
    main([*cut, "--loop.steps", "2"])
    main([*cut, "--resume"])
    assert losses(tmp_path / "cut") == losses(tmp_path / "run")
    assert "lora.rank: 2 -> 3" in refused(capfd, *cut, "--resume", "--lora.rank", "3")


def test_of_a_hugging_face_folder_with_frozen_embeddings(files, tmp_path):
    source = tiny_folder(tmp_path / "hf")
    main(flags(files, tmp_path / "run", 2, "--init", str(source), "--freeze", "embed", "--pipeline.seq-len", "256"))
    before, after = load_hf(source)[1], load_pretrained(tmp_path / "run")
    np.testing.assert_array_equal(before["embed"]["embedding"], after.params["embed"]["embedding"])
    assert not np.array_equal(before["head"]["kernel"], after.params["head"]["kernel"])
    assert after.chat.source == CHATML and after.start == ()  # as transformers renders it


def test_the_loss_does_not_depend_on_packing():
    """Sums over targets of packed rows are those of each conversation alone."""
    form = ChatFormat(ChatTemplate(CHATML), json_tokenizer())
    chats = encode_source(open_conversations(rows(9)), form, seq_len=200)
    model = build(MODEL)
    params = jax.jit(model.init)(jax.random.key(0))
    mean = jax.jit(lambda batch: make_loss(model)(params, batch, None)[1]["loss"])
    packed = whole_batches(chats, chat_example, batch_size=2, seq_len=200)
    alone = [batch for one in chats for batch in whole_batches(
        Chats("one", chats.config, [one]), chat_example, batch_size=2, seq_len=200)]
    totals = [np.sum([jnp.stack(mean(batch)) for batch in part], axis=0) for part in (packed, alone)]
    assert len(packed) < len(alone) and totals[0][1] == chats.num_targets
    np.testing.assert_allclose(totals[0], totals[1], rtol=1e-5)


def test_wrong_flags(files, scratch, tmp_path, capfd):
    folder = tmp_path / "new"
    ok = [*TINY, *flags(files, folder, 2)]
    init = [*flags(files, folder, 2), "--init", str(scratch)]
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    plain = tiny_folder(tmp_path / "plain", specials=("<s>", "</s>", "<pad>"), template=None)
    cases = {
        r"lacks special tokens that the chat template writes: <\|im_start\|>, <\|im_end\|>": [
            *flags(files, folder, 2), "--init", str(plain)],
        r"lacks special tokens .* it has <bos>": [*ok, "--tokenizer.path", "bytes"],
        "does not write <": [*ok, "--template", str(files / "train.jsonl")],
        r"template hermse is neither a file .*\(did you mean 'hermes'\?\)": [*ok, "--template", "hermse"],
        r"bad\.jsonl:1: message 0: the content is not a string": [*ok, "--data.path", str(tmp_path / "bad.jsonl")],
        "concat would cut conversations": [*ok, "--pipeline.packing", "concat", "--pipeline.num-bins", "None"],
        "lora.rank adapts weights that exist": [*ok, "--lora.rank", "2"],
        "freeze has no effect with lora": [*init, "--lora.rank", "2", "--freeze", "embed"],
        "freeze: no parameter's path matches 'embde'": [*init, "--freeze", "embde"],
        "every parameter is frozen": [*init, "--freeze", "."],
        "leave out the --model flags": [*init, "--model.d-ff", "48"],
        "leave out the --tokenizer flags": [*init, "--tokenizer.path", "bytes"],
        "neither a .gguf file nor a run folder": [*flags(files, folder, 2), "--init", str(tmp_path / "nowhere")],
        "no conversation left of 40: .*40 too long": [*ok, "--pipeline.seq-len", "8"],
        "no token '<thnik>'": [*ok, "--data.never-predict", "<thnik>"],
        "holds no run": [*ok, "--resume"],
        "vocab_size 270 is too small": [*ok, "--model.vocab-size", "270"],
    }
    for message, arguments in cases.items():
        assert re.search(message, refused(capfd, *arguments)), message
        assert not folder.exists()


def test_presets_are_complete():
    for name, config in PRESETS.items():
        assert from_json(Config, to_json(config)) == config, name
        check(config, make_mesh(config.mesh))
