"""recipes.rl_distill and its neighbours as a user calls them."""

import dataclasses
import json

import jax
import pytest

from jaxlm.core.mesh import make_mesh
from jaxlm.core.tree import count_parameters
from jaxlm.data.chat_template import TEMPLATE_FILE, TEMPLATES
from jaxlm.data.tokenizer import save_tokenizer
from jaxlm.model.decoder import build
from jaxlm.model.hf import save_hf
from jaxlm.model.lora import LoraConfig
from jaxlm.rl.plan import update_program
from jaxlm.rl.task import read_tasks
from recipes import demonstrations, rl_distill, teacher
from tests.tiny_chat import MODEL, json_tokenizer, tiny_folder

WORDS = "words:train?count=12&num_tools=4&max_calls=1"
SMALL = ["--rollout.max-prompt", "400", "--rollout.max-response", "24", "--batch.prompts", "2", "--batch.samples", "2",
         "--batch.seq-len", "430", "--batch.micro-rows", "8", "--rollout.engine.batch-size", "8",
         "--loop.iterations", "2", "--loop.eval-every", "2", "--loop.pages-every", "1", "--checkpoint.every", "1",
         "--tasks.train", WORDS, "--tasks.held-out", "words:unseen?count=2&num_tools=5&max_calls=1"]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    config = dataclasses.replace(MODEL, max_positions=512)
    save_hf(folder, config, jax.jit(build(config).init)(jax.random.key(0)), architecture="llama", overwrite=True)
    save_tokenizer(json_tokenizer(), folder)
    (folder / TEMPLATE_FILE).write_text(TEMPLATES["hermes_names"])
    return folder


def fails(capsys, *arguments, recipe=rl_distill):
    with pytest.raises(SystemExit) as error:
        recipe.main([str(one) for one in arguments])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_a_run_from_flags_to_files(student, tmp_path, capsys):
    folder = tmp_path / "run"
    rl_distill.main(["--init", str(student), "--folder", str(folder), *SMALL])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("reward" in one for one in records) == 2
    assert sum("eval/words:unseen/correct" in one for one in records) == 2
    assert (folder / "pages" / "000001.html").exists() and (folder / "config.json").exists()
    assert "held out at iteration 2" in capsys.readouterr().out
    assert "already" in fails(capsys, "--init", student, "--folder", folder, *SMALL)
    assert "reward" in fails(capsys, "--init", student, "--folder", folder, *SMALL, "--resume", "--reward.base", "0.5")
    rl_distill.main(["--init", str(student), "--folder", str(folder), *SMALL, "--resume", "--loop.iterations", "3"])
    assert "iteration 3" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [
    ((), "--init names the student"),
    (("--init", "nowhere"), "neither a .gguf file nor a run folder"),
    (("--init", "STUDENT", "--rollout.temperature", "0"), "nothing could be learnt"),
    (("--init", "STUDENT", "--batch.samples", "1"), "leaves nothing to compare"),
    (("--init", "STUDENT", "--rollout.max-response", "500"), "more than the model's 512 positions"),
    (("--init", "STUDENT", "--batch.seq-len", "100"), "cannot hold"),
    (("--init", "STUDENT", "--batch.prompts", "100"), "tasks are fewer than batch.prompts 100"),
    (("--init", "STUDENT", "--tasks.train", "wrods:train"), "did you mean 'words'"),
    (("--init", "STUDENT", "--tasks.train", "missing.jsonl"), "missing.jsonl"),
    (("--init", "STUDENT", "--teacher", "STUDENT"), "give both or none"),
    (("--preset", "mentro"), "did you mean 'mentor'"),
    (("--init", "STUDENT", "--env.template", "hermse"), "did you mean 'hermes'"),
    (("--init", "STUDENT", "--env.template", "chatml"), "give --env.template hermes"),
    (("--init", "STUDENT", "--tasks.search.corpus", "missing.jsonl"), "missing.jsonl: cannot be read"),
    (("--plan", "v5e:2x2", "--batch.prompts", "5", "--batch.micro-rows", "4"),
     "batch.micro_rows 4 does not divide the 10 rows"),
    (("--init", "STUDENT", "--model.num-layers", "3"), "leave out the --model flags"),
    (("--init", "STUDENT", "--objective.advantage", "gdpo"), "rewards of plain terms"),
    (("--init", "STUDENT", "--mesh.data", "1", "--mesh.tensor", "8"), "cannot be split"),
    (("--init", "STUDENT", "--folder", "STUDENT", "--overwrite"), "are the same folder"),
    (("--init", "STUDENT", "--tasks.held-out", WORDS), "are named twice"),
    (("--init", "STUDENT", "--compute.attention", "cudnn"), "attention backend 'cudnn'"),
    (("--plan", "v5p:2x2x2", "--overwrite"), "--plan writes nothing"),
    (("--init", "STUDENT", "--env.question", "no place"), "{question}"),
    (("--init", "STUDENT", "--batch.minibatches", "3"), "do not divide into 3 minibatches"),
    (("--init", "STUDENT", "--batch.micro-rows", "3"), "batch.micro_rows 3 does not divide over the 8 devices"),
])
def test_bad_flags_are_one_sentence(flags, message, student, tmp_path, capsys):
    flags = [str(student) if one == "STUDENT" else one for one in flags]
    preset = [] if "--preset" in flags else [one for i, one in enumerate(SMALL) if not any(
        name in flags and (one == name or SMALL[i - 1] == name) for name in SMALL[::2])]
    folder = [] if "--folder" in flags else ["--folder", tmp_path / "run"]
    assert message in fails(capsys, *preset, *flags, *folder)
    assert not (tmp_path / "run").exists()


def test_what_an_update_of_mentor_costs_on_chips_that_are_not_here(student, capsys):
    rl_distill.main(["--preset", "mentor", "--init", str(student), "--rollout.max-prompt", "60",
                     "--rollout.max-response", "68", "--batch.seq-len", "128", "--plan", "v5e:2x2"])
    said = capsys.readouterr().out
    assert "One update of 80 rows of 128 tokens" in said
    assert "4 x TPU v5 lite; mesh fsdp 4; accumulate 10" in said and "MFU at most" in said


def test_a_planned_update_of_adapters_keeps_no_moments_of_the_base():
    config = rl_distill.PRESETS["smoke"]
    sizes, mesh = [], make_mesh(config.mesh)
    for rank in (0, 2):
        config = dataclasses.replace(config, lora=LoraConfig(rank=rank))
        step, (state, batch) = update_program(
            rl_distill.settings_of(config), rl_distill.make_tx(config), 1e-4, mesh, accumulate=8)
        assert batch.rows.tokens.shape == (64, 880)
        assert jax.tree.structure(jax.eval_shape(step, state, batch)[0]) == jax.tree.structure(state)
        sizes.append((count_parameters(state.params), count_parameters(state.opt_state)))
    adapters = sizes[1][0] - sizes[0][0]
    assert sizes[0][1] > 2 * sizes[0][0] and 0 < sizes[1][1] < 2 * adapters + 10


def test_a_task_file_with_a_missing_field_is_named(student, tmp_path, capsys):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"id": "a", "question": "1 + 1?", "tools": [], "judge": "numeric", "domain": "x"}\n')
    message = fails(capsys, "--init", student, "--tasks.train", path, "--folder", tmp_path / "run")
    assert f"{path}:1: field 'answers' is missing" in message


def test_a_teacher_of_another_tokenizer_is_refused(student, tmp_path, capsys):
    other = tiny_folder(tmp_path / "other", specials=("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<more>"))
    assert "another tokenizer" in fails(
        capsys, "--init", student, "--teacher", other, "--objective.teacher.coefficient", "1", *SMALL, "--folder",
        tmp_path / "run")


def test_on_policy_distillation_comes_nearer_to_its_teacher(student, tmp_path):
    """As an advantage of each token with k1, and in the loss with k2: the gradients are the same, sample by sample."""
    other, distances = tmp_path / "teacher", []
    config = dataclasses.replace(MODEL, max_positions=512)
    save_hf(other, config, jax.jit(build(config).init)(jax.random.key(7)), architecture="llama")
    save_tokenizer(json_tokenizer(), other)
    for place, estimator in (("advantage", "k1"), ("loss", "k2")):
        folder = tmp_path / place
        rl_distill.main(["--init", str(student), "--teacher", str(other), "--folder", str(folder), *SMALL,
                         "--objective.teacher.coefficient", "1", "--objective.teacher.place", place,
                         "--objective.teacher.estimator", estimator, "--objective.kl.coefficient", "0",
                         "--batch.samples", "8", "--loop.iterations", "5", "--optim.lr", "2e-2",
                         "--optim.schedule.warmup", "0", "--checkpoint.every", "5", "--loop.eval-every", "5"])
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        distances.append([one["teacher_k1"] for one in records if "teacher_k1" in one])
    assert distances[0] == pytest.approx(distances[1], rel=1e-3)
    assert len(distances[0]) == 5 and distances[0][-1] < 0.8 * distances[0][0], distances


def test_demonstrations_are_rows_for_sft(tmp_path, capsys):
    path = tmp_path / "d.jsonl"
    demonstrations.main(["--tasks", WORDS, "--output", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 12 and all(row["messages"][-1]["role"] == "assistant" and row["tools"] for row in rows)
    assert "exists" in fails(capsys, "--tasks", WORDS, "--output", path, recipe=demonstrations)
    assert "{question}" in fails(capsys, "--question", "x", "--output", tmp_path / "e", recipe=demonstrations)


def test_a_teacher_s_right_attempts_become_tasks(student, tmp_path, monkeypatch, caplog):
    """A random model solves nothing; what it is said to have solved is written, and a second run reads it."""
    output = tmp_path / "taught.jsonl"
    flags = ["--source", str(student), "--tasks", WORDS, "--output", str(output), "--samples", "1", "--chunk", "8",
             "--rollout.max-prompt", "330", "--rollout.max-response", "12"]
    monkeypatch.setattr(teacher, "taught", lambda tasks, episodes, scored: [tasks[episodes[0].task]])
    teacher.main(flags)
    found = read_tasks(output)
    assert len(found) == 2 and all(task.teacher for task in found)
    monkeypatch.setattr(teacher, "rollout", lambda *_, **__: pytest.fail("everything was there"))
    teacher.main(flags)
    assert read_tasks(output) == found
