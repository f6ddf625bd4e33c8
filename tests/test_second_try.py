"""second_try.py: completions that go on after an observation, exact in both engines; and on the command line."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import run_in_process, tiny_database
from little_policy import little_policy_folder
from test_grpo import make_model
from test_names import Even, EvenWriting

import ask
import cold_start
import evaluate
import report
import second_try
import settings
import sft
import train
from common.errors import UserError
from data import Example, PromptBuilder, PromptConfig, columns_of
from engine.fast import FAST
from grpo import PLAIN, Group, GRPOConfig, has_gradient, micro_batches, policy_update
from models import memory_plan
from partial_credit.traces import failing_query
from policy import load_policy
from prompts.answer_format import AnswerFormat
from running.run_folder import step_metrics
from running.show import group_text
from scoring.answers import verified_traces
from scoring.voting import Candidate, Exam, side_by_side
from second_try import SecondTry, Support, answers, masks, tries
from sql_exec import Execution, SQLExecutor
from variants import overlong_penalty

ENDS = (2, 5, 6, 8)
OBSERVED = [torch.tensor([20, 21, 22]), torch.tensor([19])]


class Scripted(SecondTry):
    """Answers whose first token is odd get a second try, after a scripted observation."""

    def observe(self, asked, texts):
        return [OBSERVED[int(text) % 4 == 1] if int(text) % 2 else None for text in texts]


POLICY = SimpleNamespace(decode=lambda tokens: str(tokens[0].item()), eos_ids=ENDS, device=torch.device("cpu"))


def sampled_by(engine, model, rules=None, temperature=0.8, room=Exam.room, turns=2):
    prompts = [torch.arange(3, 9), torch.arange(4, 13), torch.arange(3, 9)]
    config = GRPOConfig(group_size=6, max_completion_tokens=7, temperature=temperature, kl_coef=0.0)
    names = SimpleNamespace(of_all=lambda asked: rules) if rules else None
    support = Support(names, Scripted(POLICY, None, None, AnswerFormat()) if turns == 2 else None)
    policy = SimpleNamespace(model=model, eos_ids=ENDS)
    split = partial(side_by_side, exam=Exam(AnswerFormat(), 7, room=room))
    return support.sample(policy, prompts, [None] * 3, config, seeds=[1, 2, 3], engine=engine, split=split), config


def test_a_second_try_follows_the_first_and_all_that_was_sampled_before_stays():
    model = make_model()
    alone, _ = sampled_by(FAST, model, turns=1)
    groups, config = sampled_by(FAST, model)
    again = 0
    for first, group in zip(alone, groups, strict=True):
        for i, completion in enumerate(first.completions):
            parts, mask = tries(group)[i], masks(group)[i]
            assert torch.equal(parts[0], completion) and torch.equal(answers(group)[i], parts[-1])
            if first.truncated[i] or completion[0] % 2 == 0:
                assert len(parts) == 1 and mask.all()
                continue
            again += 1
            _, observed, second = parts
            assert observed.tolist() == OBSERVED[int(completion[0] % 4 == 1)].tolist()
            assert torch.equal(torch.cat(parts), group.completions[i])
            assert mask.tolist() == [True] * len(completion) + [False] * len(observed) + [True] * len(second)
            assert group.truncated[i] == (not set(ENDS) & set(second.tolist())) and 0 < len(second) <= config.max_completion_tokens
            assert len(group.logps[i]) == len(group.entropies[i]) == len(group.completions[i])
    assert again > 4 and sum(map(sum, (group.truncated for group in alone))) > 0  # both cases occur
    assert second_try.share(groups) == again / 18
    few, _ = sampled_by(FAST, model, room=(40, 60))  # one or two at a time
    assert [[c.tolist() for c in g.completions] for g in few] == [[c.tolist() for c in g.completions] for g in groups]


@pytest.mark.parametrize("rules", [None, [Even(), Even(), Even()]])
def test_both_engines_sample_and_learn_the_same(rules):
    """Log-probabilities, ratio, gap and gradient, in float64; with a rule, which begins anew in the second try."""
    gradients = []
    for engine in (PLAIN, FAST):
        model = make_model()
        groups, config = sampled_by(engine, model, rules)
        advantages = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        batches = micro_batches(groups, advantages, config)
        stats = policy_update(model, torch.optim.SGD(model.parameters(), lr=0.0), batches, config, engine)
        assert stats["ratio_max"] == 1.0 and stats["sampler_gap"] < 1e-6
        assert stats["tokens"] == stats["trained_tokens"] == sum(int(mask.sum()) for group in groups for mask in masks(group))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        gradients.append([[c.tolist() for c in group.completions] for group in groups])
    torch.testing.assert_close(gradients[0], gradients[2], atol=1e-9, rtol=0)
    assert gradients[1] == gradients[3] and second_try.share(groups) > 0.1


def test_what_was_observed_counts_in_no_loss():
    """The gradient is that of the sampled tokens alone, written out: GRPO's mean over a completion's sampled tokens."""
    model = make_model()
    groups, config = sampled_by(FAST, model)
    advantages = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = 0.0
    for group, A in zip(groups, advantages, strict=True):
        for completion, mask, a in zip(group.completions, masks(group), A, strict=True):
            row = torch.cat([group.prompt, completion])
            logits = model(row[None]).logits[0, len(group.prompt) - 1:-1] / config.temperature
            logp = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]  # [C]
            loss = loss - a * logp[mask].mean() / advantages.numel()
    loss.backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    policy_update(model, torch.optim.SGD(model.parameters(), lr=0.0), micro_batches(groups, advantages, config),
                  replace(config, max_grad_norm=0.0), FAST)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), exact, atol=1e-10, rtol=0)


def test_log_probabilities_are_those_of_the_second_try_in_its_context():
    model = make_model()
    groups, config = sampled_by(FAST, model, [Even(), Even(), Even()])
    checked = 0
    for group in groups:
        for i, completion in enumerate(group.completions):
            if len(tries(group)[i]) == 1:
                continue
            logits = model(torch.cat([group.prompt, completion])[None]).logits[0, len(group.prompt) - 1:-1] / config.temperature
            writing, before = EvenWriting(), True
            for t, (token, sampled) in enumerate(zip(completion.tolist(), masks(group)[i].tolist(), strict=True)):
                if sampled and not before:
                    writing = EvenWriting()  # the rule begins anew
                before = sampled
                if not sampled:
                    assert group.logps[i][t] == group.entropies[i][t] == 0
                    continue
                tokens = list(range(0, 23, 2)) if writing.bits() is not None else list(range(23))
                p = logits[t, tokens].softmax(-1)
                assert group.logps[i][t].item() == pytest.approx(p[tokens.index(token)].log().item(), abs=2e-6)
                writing.take(token)
                checked += 1
    assert checked > 20


def test_lengths_and_entropy_count_what_was_sampled():
    group = Group(torch.arange(3), [torch.arange(6), torch.arange(4)], [torch.zeros(6), torch.zeros(4)], [True, False],
                  [torch.tensor([1.0, 1, 0, 0, 4, 4]), torch.ones(4)], (),
                  [torch.tensor([True, True, False, False, True, True]), torch.ones(4, dtype=torch.bool)])
    config = GRPOConfig(max_completion_tokens=4, overlong_buffer=4)
    assert overlong_penalty([group], config).tolist() == [[-0.5, -1.0]]  # of the answer
    kept = micro_batches([group], torch.ones(1, 2), GRPOConfig(overlong="mask"))[0]
    assert kept.mask.int().tolist() == [[0] * 6, [1, 1, 1, 1, 0, 0]] and has_gradient(kept, config)
    rollout = SimpleNamespace(group=group, rewards=[SimpleNamespace(status="ok")] * 2, readable=False)
    metrics = step_metrics(1, [rollout], [], {}, {"all": 1.0}, {})
    assert (metrics["completion_length"], metrics["completion_length_max"], metrics["entropy"]) == (4.0, 4.0, 14 / 8)


# ---- what is observed


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """A policy that sometimes misnames a column, its database and its prompts."""
    path = tiny_database(tmp_path_factory.mktemp("music") / "music.sqlite")
    policy = load_policy(str(little_policy_folder(path)))
    return policy, path, PromptBuilder({"music": path}, policy.tokenizer, PromptConfig(style="compact"))


def question(text="Which country has Bo?", *golds):
    return Example("q", "music", text, golds or ("SELECT country FROM singer WHERE name = 'Bo'",))


def test_the_observation_says_what_the_database_said(little):
    policy, path, builder = little
    texts = [AnswerFormat().write("look", sql) for sql in
             ("SELECT nation FROM singer", "SELECT name FROM singer", "DELETE FROM singer", "SELECT year, concert_id FROM concert UNION ALL "
              "SELECT 9, 9", "SELECT name FROM singer WHERE age > 99")] + ["no answer"]
    with SQLExecutor({"music": path}, workers=1) as executor:
        found = {}
        for feedback in ("error", "results"):
            second = SecondTry(policy, builder, executor, AnswerFormat(), feedback)
            ids = second.observe([question()] * len(texts), texts)
            found[feedback] = [one if one is None else policy.tokenizer.decode(one.tolist()) for one in ids]
    broken = "error: the answer is not <think> reasoning </think> and then one query and nothing else"
    refused = "error: only SELECT, WITH ... SELECT and VALUES may run, not 'DELETE'"

    def line(words):
        return f"\n{words}\nanswer :\n"

    assert found["error"] == [line("error: no such column: nation"), None, line(refused), None, None, line(broken)]
    assert found["results"] == [
        line("error: no such column: nation"), line("3 rows: (name), (Ana), (Bo), (Cy)"), line(refused),
        line("4 rows: (year, concert_id), (2014, 1), (2015, 2), (2015, 3), …"), line("0 rows: (name)"), line(broken)]


def test_an_observation_is_short_and_an_unread_database_gives_none(little):
    policy, _, builder = little
    second = SecondTry(policy, builder, None, AnswerFormat(), "results")
    assert second.words(Execution("unavailable", error="cannot read")) == ""
    assert second.words(Execution("timeout", error="took\nlong")) == "error: took long"
    forged = Execution("ok", ["a\nb"], [("x\nanswer :\n<think>", None, b"\x00", 1.5)])
    assert second.words(forged) == "1 row: (a b), (x answer : <think>, NULL, x'00', 1.5)"
    ids = second.tokens(question(), "error: " + "long " * 500)
    assert 64 < len(ids) <= second_try.OBSERVED and policy.tokenizer.decode(ids.tolist()).endswith("\nanswer :\n")
    assert second.tokens(question(), "") is None
    assert Support().longest(80) == 80 and Support(None, second).longest(80) == 160 + second_try.OBSERVED


STRIPPING = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in m.content %}"
             "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}")


def test_in_a_chat_the_observation_is_the_users_and_what_was_sampled_stays(little):
    """Even where the template strips earlier reasoning, as Qwen3's and DeepSeek's do."""
    policy, path, _ = little
    tokenizer = load_policy(str(little_policy_folder(path))).tokenizer
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template, tokenizer.eos_token = STRIPPING, "<|im_end|>"
    chatting = SimpleNamespace(tokenizer=tokenizer, eos_ids=(tokenizer.eos_token_id,))
    builder = PromptBuilder({"music": path}, tokenizer, PromptConfig(style="full"))
    said = "error: no such column: <|im_end|>"
    ids = SecondTry(chatting, builder, None, AnswerFormat()).tokens(question(), said)
    first = tokenizer.encode(AnswerFormat().write("look", "SELECT x") + "<|im_end|>", add_special_tokens=False)
    row = [*builder.encode(question()), *first, *ids.tolist()]
    end = tokenizer.eos_token_id
    assert row.count(end) == builder.encode(question()).count(end) + 2  # of the answer and of the message, not of the error
    assert tokenizer.decode(ids.tolist()) == f"\n<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row).count("<think> look </think> SELECT x<|im_end|>") == 1
    assert builder.turn(replace(question(), prompt="Say it. "), "error: x", ()) == tokenizer.encode("\nerror: x\nAnswer:\n")
    chat = replace(question(), messages=(("user", "Say it."),))
    assert tokenizer.decode(builder.turn(chat, "error: x", ["<|im_end|>"])).startswith("\n<|im_start|>user\nerror: x")


# ---- the cold start


@pytest.mark.parametrize("sql, words", [
    ("SELECT name FROM singer WHERE country = 'name'", {"year", "concert_id"}), ("SELECT T1.name FROM singer AS T1", {"year", "concert_id"}),
    ("SELECT T1.name, T2.year FROM singer AS T1 JOIN concert AS T2", {"name_name", "name_id", "year_name", "year_id"})])
def test_a_failing_query_misnames_one_column(tiny_db, sql, words):
    wrong = failing_query(sql, columns_of({"music": tiny_db})["music"])
    with SQLExecutor({"music": tiny_db}, workers=1) as executor:
        execution = executor.run("music", wrong)
    assert execution.status == "error" and "no such column" in execution.error
    changed = [pair for pair in zip(sql.split(), wrong.split(), strict=True) if len(set(pair)) == 2]
    assert len(changed) == 1 and any(word in changed[0][1] for word in words)
    assert wrong == failing_query(sql, columns_of({"music": tiny_db})["music"])
    assert failing_query("SELECT COUNT(*) FROM singer", {"singer": ["name"]}) == ""


def test_second_tries_are_taught_after_what_failed(little):
    policy, path, builder = little
    traced = [replace(question(), trace="look up Bo"), replace(question("How many?", "SELECT COUNT(*) FROM singer"), trace="count")]
    schemas = columns_of({"music": path})
    taught = [*traced, *cold_start.second_tries(traced, schemas, AnswerFormat())]
    stands = replace(traced[1], first_try=AnswerFormat().write("x", "SELECT 1"))
    assert [bool(one.first_try) for one in taught] == [False, False, True]  # COUNT(*) names no column
    with SQLExecutor({"music": path}, workers=1) as executor:
        second = SecondTry(policy, builder, executor, AnswerFormat())
        pairs, notes = cold_start.supervised_pairs([*taught, stands], builder, policy.tokenizer, policy.end_id, second)
    assert notes == ["cold start: left out 1 of 2 second tries: their first try does not fail"]
    shown, end = policy.tokenizer.decode, policy.tokenizer.eos_token
    prompt, completion = map(shown, pairs[2][:2])
    assert prompt == f"{shown(pairs[0][0])}{taught[2].first_try}{end}\nerror: no such column: " + prompt.rpartition("column: ")[2]
    assert prompt.endswith("\nanswer :\n") and completion == shown(pairs[0][1]) == f"<think> look up Bo </think> {traced[0].gold_sql}{end}"
    torch.manual_seed(0)
    with torch.no_grad():  # the loss on prompts leaves out what failed
        pair = cold_start.Pair(*pairs[2])
        read, whole = (cold_start.supervised_losses(policy.model, [one], with_prompts=True) for one in (pair, pair[:2]))
        own, = (cold_start.supervised_losses(policy.model, [(pairs[0][0], pair.completion)], with_prompts=True)[1],)
    assert read[0] == whole[0] and read[1].item() == pytest.approx(own.item(), rel=1e-5) != whole[1].item()
    pairs, notes = cold_start.supervised_pairs(taught[2:], builder, policy.tokenizer, policy.end_id)
    assert pairs == [] and notes == ["cold start: left out 1 of 1 second tries: only --turns 2 teaches them"]
    pairs, notes = cold_start.supervised_pairs(taught, builder, policy.tokenizer, policy.end_id)
    assert len(pairs) == 2 and notes == ["cold start: left out 1 of 1 second tries: only --turns 2 teaches them"]


def test_a_verified_second_try_is_a_trace_of_a_second_try():
    right = SimpleNamespace(gold_status="ok", verified=True)
    first, second = (Candidate("", "look", "SELECT 1", -1.0, 5, False, **tried) for tried in ({}, {"first_try": "x", "observation": "e"}))
    records = verified_traces(question(), [first, second], {"SELECT 1": (right, None)})
    assert [record.get("first_try") for record in records] == [None, "x"]


def test_repairs_keep_to_the_limits_of_traces_and_need_gold_sql():
    examples = [replace(question(), id=name, trace="look") for name in "abc"] + [replace(question(), id="d", gold_sqls=(), trace="look")]
    records = [{"id": one.id, "failing": ["x", "y", "z"], "answers": {"sample": {"difficulty": "easy"}}} for one in examples]
    config = sft.MineConfig(mine="x.jsonl", model="m", max_per_question=2, max_per_cell=4)
    kept = sft.choose_repairs(records, examples, {}, config)
    assert [(one["id"], one["first_try"]) for one in kept] == [("a-repair-1", "x"), ("b-repair-1", "x"), ("c-repair-1", "x"), ("a-repair-2", "y")]


def test_the_plan_counts_both_tries_and_advises_the_limit_of_one():
    flags = ["--model", "qwen2.5-3b", "--data", "bird", "--lora-rank", "16", "--plan", "20"]
    one, two = (train.parse_settings([*flags, "--turns", turns]) for turns in ("1", "2"))
    (shape, work), (_, longer) = settings.planned(one), settings.planned(two)
    assert (work.longest, longer.longest) == (1536, 2 * 1536 + second_try.OBSERVED) and longer.completion == 1536
    assert memory_plan.group_tokens(replace(longer, micro_batch=4)) - memory_plan.group_tokens(replace(work, micro_batch=4)) == 4 * (1536 + 128)
    advice = " ".join(memory_plan.smaller(shape, replace(longer, micro_batch=1), 8e9))
    assert "--max-completion-tokens" not in advice or "--max-completion-tokens 768" in advice
    with pytest.raises(UserError, match="--feedback results says what a second try reads: give --turns 2 as well"):
        train.parse_settings([*flags, "--feedback", "results"])


# ---- on the command line


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """Flags of a short run of the little policy, on questions that it half knows."""
    folder = tmp_path_factory.mktemp("songs")
    records = [{"db_id": "music", "question": "Which country has Bo?", "sql": "SELECT country FROM singer WHERE name = 'Bo'"},
               {"db_id": "music", "question": "How many singers are there?", "sql": "SELECT COUNT(*) FROM singer"}]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    model = little_policy_folder(tiny_database(folder / "music.sqlite"))
    return ["--model", str(model), "--data", str(folder / "mine.jsonl"), "--threads", "1", "--max-completion-tokens", "40",
            "--prompt-style", "compact"]


@pytest.fixture(scope="module")
def run(songs, tmp_path_factory):
    """A run with second tries: its folder, and the flags of it."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    flags = [*songs, "--turns", 2, "--cold-start-steps", 10, "--traces", "template", "--cold-start-lr", 1e-3, "--prompts-per-step", 2,
             "--group-size", 8, "--rewards", "format,execution", "--kl-coef", 0, "--eval-questions", 0, "--test-questions", 0, "--lr", 1e-4]
    status, out, errors = run_in_process(train, *flags, "--steps", 3, "--save-every", 1, "--keep", 9, "--verbose", 1, "--output", folder)
    assert status == 0, out + errors
    return folder, flags, out


def test_a_run_logs_second_tries_and_shows_them(run, tmp_path):
    folder, _, out = run
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    again = [c for record in records for c in record["completions"] if "first_try" in c]
    assert again and sum(line["second_tries"] for line in metrics) * 16 == len(again)
    assert all(line["sampler_gap"] < 1e-4 and line["ratio_mean"] == 1.0 for line in metrics)
    assert all(c["observation"].startswith("error: ") and "answer :" not in c["observation"] and AnswerFormat().read(c["first_try"]) != (c["thought"], c["sql"]) or not c["sql"] for c in again)
    assert all(c["first_try"] not in c["text"] for c in again if c["sql"])
    failing = [c for record in records for c in record["completions"] if "first_try" not in c]
    assert failing and all(c["status"] == "ok" or c["truncated"] for c in failing)
    group = next(record for record in records if any("first_try" in c for c in record["completions"]))
    text = group_text(group, colour=False)
    assert "first try: <think>" in text and "error: " in text and "first try: " in out
    page = report.write_report(folder).read_text()
    assert "First try" in page and "Second tries" in page


def test_a_resumed_run_is_the_same(run, tmp_path):
    import shutil

    folder, flags, _ = run
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for step in (2, 3):
        shutil.rmtree(other / "checkpoints" / f"step-{step}")
    status, out, errors = run_in_process(train, "--resume", "--output", other, "--steps", 3)
    assert status == 0, out + errors
    names = ("reward", "loss", "grad_norm", "second_tries", "entropy", "completion_length")
    assert [[json.loads(line)[name] for name in names] for line in (folder / "metrics.jsonl").read_text().splitlines()] == \
        [[json.loads(line)[name] for name in names] for line in (other / "metrics.jsonl").read_text().splitlines()]


def test_evaluations_questions_and_mining_have_second_tries_as_the_run(run, songs, tmp_path, capsys):
    folder, *_ = run
    model = folder / "checkpoints" / "step-0"
    found = {}
    asked = [*songs[2:], "-n", 8]
    for name, flags in (("handed on", ["--model", model, *songs[2:6], "-n", 8]), ("one", ["--model", model, *songs[2:6], "-n", 8, "--turns", 1]),
                        ("two", [*songs[:2], *asked, "--turns", 2]), ("results", [*songs[:2], *asked, "--turns", 2, "--feedback", "results"])):
        file = tmp_path / f"{name}.json"
        status, out, errors = run_in_process(evaluate, *flags, "--json", file)
        assert status == 0, out + errors
        found[name] = json.loads(file.read_text())
        assert ("answers that are second tries" in out) == (name != "one")
    assert found["one"]["second_tries"] == 0 < found["two"]["second_tries"] < found["results"]["second_tries"]
    assert found["handed on"]["protocol"] | {"turns": 1} == found["one"]["protocol"] | {"feedback": "error"}
    status, _, errors = run_in_process(evaluate, "--compare", tmp_path / "one.json", tmp_path / "handed on.json")
    assert status == 2 and "turns (1 and 2)" in errors

    mined = tmp_path / "mined.jsonl"
    status, out, errors = run_in_process(sft, "--mine", mined, "--model", songs[1], *songs[2:6], "--prompt-style", "compact", "-n", 16,
                                         "--max-completion-tokens", 40, "--repair", "--memory-min-words", 1, "--memory-min-density", 0)
    assert status == 0, out + errors
    records = [json.loads(line) for line in mined.read_text().splitlines()]
    repairs = [record for record in records if "first_try" in record]
    assert repairs and f"and {len(repairs)} answers that do not run" in out
    assert any("nation" in one["first_try"] and one["sql"].startswith("SELECT country") for one in repairs)
    assert all(one["trace"] and AnswerFormat().read(one["first_try"]) for one in repairs)
    status, out, errors = run_in_process(train, *songs, "--traces", mined, "--turns", 2, "--cold-start-steps", 1, "--steps", 0,
                                         "--rewards", "format,execution", "--output", tmp_path / "taught")
    assert status == 0 and f"on {len(records)} traces" in out, out + errors


def test_ask_shows_the_first_try_and_its_error(run, songs, capsys):
    folder, *_ = run
    database = songs[3].replace("mine.jsonl", "music.sqlite")
    made = ask.build(ask.AskConfig, {"database": database, "model": str(songs[1]), "samples": 1, "turns": 2, "max_completion_tokens": 40,
                                     "workers": 1})
    with ask.Asker(made, PromptConfig(style="compact")) as asker:
        assert asker.support.second.feedback == "error"
        asker.exam = replace(asker.exam, samples=12, temperature=1.0)
        reply = asker.ask("Which country has Bo?")
    tried = replace(reply.answer, first_try="<think> x </think> SELECT nation FROM singer", observation="error: no such column: nation")
    ask.print_reply(replace(reply, answer=tried), made, False)
    shown = capsys.readouterr().out
    assert "first try: <think> x </think> SELECT nation FROM singer\nerror: no such column: nation\n" in shown
    assert replace(reply, answer=tried).as_json()["observation"] == "error: no such column: nation"
