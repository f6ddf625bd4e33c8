"""prompts/names.py: SQL of the names of one database; and sampling under a rule, exact in both engines."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_in_process
from little_policy import little_policy_folder
from test_grpo import make_model

import evaluate
import grpo
import train
import variants
from common.errors import UserError
from data import columns_of, load_dataset
from engine.fast import FAST
from engine.packing import LOGIT_CHUNK_ELEMENTS
from grpo import PLAIN, GRPOConfig, micro_batches, policy_update, sample_groups
from policy import load_policy, train_tokenizer
from prompts.answer_format import AnswerFormat
from prompts.names import NameRules, name_rules

SCHEMA = {"singer": ["singer_id", "name", "birth date", "2nd"], "Concert": ["Year", "singer_id"]}
TEXTS = ["<think> tables singer ; columns name </think> SELECT T1.name , COUNT(*) FROM singer AS T1 JOIN concert AS T2 ON T1.singer_id "
         "= T2.singer_id WHERE T2.year > 2014 GROUP BY name ORDER BY COUNT(*) DESC LIMIT 1"] * 4
EOS = 2  # of the models below


@pytest.fixture(scope="module")
def policy():
    """As much of a policy as a rule needs: a byte-level tokenizer."""
    pytest.importorskip("llguidance")
    tokenizer = train_tokenizer(TEXTS, 600)
    head = torch.nn.Linear(4, len(tokenizer) + 5, bias=False)  # wider than the vocabulary, as in many models
    return SimpleNamespace(tokenizer=tokenizer, eos_ids=(tokenizer.eos_token_id,),
                           model=SimpleNamespace(get_output_embeddings=lambda: head))


def rule_of(policy, **style):
    return NameRules(policy, {"music": SCHEMA}, AnswerFormat(**style)).of("music")


def may(bits, token) -> bool:
    return bits is None or bool(bits[token // 32].item() >> token % 32 & 1)


def refused(policy, rule, text) -> str | None:
    """The text from the first token that the rule forbids; `end` if the text may not end there; None if all is allowed."""
    ids, writing = policy.tokenizer.encode(text, add_special_tokens=False), rule.start()
    for i, token in enumerate([*ids, policy.eos_ids[0]]):
        if not may(writing.bits(), token):
            return policy.tokenizer.decode(ids[i:]) or "end"
        writing.take(token)
    return None


@pytest.mark.parametrize("sql", [
    "SELECT name FROM singer", "select NAME, Singer_ID from SINGER where Name like '%o''b%';", "SELECT COUNT(*) , 2.5e3 FROM singer LIMIT 10",
    "SELECT t1.name FROM singer AS t1 JOIN concert c ON t1.singer_id=c.singer_id", "SELECT \"birth date\", [2nd], `anything` FROM singer",
    "SELECT name AS artist FROM singer ORDER BY artist", "SELECT MAX(derived1.field2) FROM (SELECT year AS field2 FROM concert) AS derived1",
    "WITH old AS (SELECT * FROM singer), new AS (SELECT * FROM concert) SELECT new.year, old.name FROM old JOIN new ON 1 = 1",
    "WITH RECURSIVE numbers AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM numbers) SELECT x FROM numbers",
    "SELECT CASE WHEN year>=2000 THEN 'new' ELSE 'it is ünïcode' END FROM concert -- year", "SELECT CAST(year AS REAL)/2 FROM concert",
    "SELECT strftime('%Y', year), rank() OVER (PARTITION BY name ORDER BY year ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) FROM concert"])
def test_what_is_right_is_allowed(policy, sql):
    assert refused(policy, rule_of(policy), f"<think> any words at all, SELECT foo </think> {sql}") is None
    assert refused(policy, rule_of(policy, style="think-answer"), f"<think> any words </think> <answer> {sql.rstrip(';')} </answer>") is None
    assert refused(policy, rule_of(policy, style="fence"), f"any words\n```sql\n{sql.rstrip(';')}\n```") is None
    assert refused(policy, rule_of(policy, lenient=True), f"<think> any words </think> ```sql\n{sql.rstrip(';')}\n```") is None


@pytest.mark.parametrize("sql, ending", [
    ("SELECT title FROM singer", "title FROM singer"), ("SELECT name FROM singers", "s"), ("SELECT names FROM singer", "s FROM singer"),
    ("SELECT t1.title FROM singer AS t1", "title FROM singer AS t1"), ("SELECT artist FROM singer", "artist FROM singer"),
    ("SELECT artist, name AS artist FROM singer", "artist, name AS artist FROM singer"), ("SELECT nam", "end"), ("SELECT name FROM sing", "end"),
    ("SELECT 2nd FROM singer", "nd FROM singer"), ("SELECT birth date FROM singer", "birth date FROM singer"),
    ("SELECT 'x", "end"), ("SELECT name; SELECT name", " SELECT name"), ("SELECT name FROM singer </think>", None)])
def test_what_is_no_name_is_refused(policy, sql, ending):
    """From the token on with which no word can be completed."""
    found = refused(policy, rule_of(policy), f"<think> x </think> {sql}")
    if ending is None:
        assert found is not None
    else:
        assert found is not None and ending.endswith(found.strip()), found  # the tokenizer may have split a word before


def test_every_gold_query_is_allowed(policy, shared_data):
    """But for one of Spider's, which reads a table that its database lacks. Right words are never refused."""
    def count(name, *where):
        dataset = load_dataset(name, *where, seed=0, world="default")
        rules = NameRules(policy, columns_of(dataset.databases), AnswerFormat())
        golds = {(example.db_id, sql) for example in dataset.examples for sql in example.gold_sqls}
        lost = []
        for db_id, sql in sorted(golds):
            writing = rules.of(db_id).start()
            for token in policy.tokenizer.encode(f"<think> x </think> {sql}", add_special_tokens=False):
                writing.take(token)
            if writing.over or not may(writing.bits(), policy.eos_ids[0]):
                lost.append(sql)
        return len(golds), lost

    geoquery = shared_data / "geoquery"
    found = {"demo": count("demo", None, "test"), "superhero": count("bird", str(shared_data / "bird_superhero"), "dev"),
             **{split: count(str(geoquery / "questions.jsonl"), str(geoquery), split) for split in ("train", "test")},
             **{f"spider {split}": count("spider", str(shared_data / "spider"), split) for split in ("dev", "train")}}
    missing = found["spider train"][1].pop()
    assert "Ref_Company_Types" in missing
    assert all(n > 100 and not lost for n, lost in found.values()), found


def test_places_that_look_alike_allow_the_same(policy):
    """The tokens allowed are kept per place, so a place must tell all that they depend on."""
    rule, checked = rule_of(policy), 0
    for sql in ("SELECT T1.name AS artist, name FROM singer AS T1 WHERE name = 'AS x' ORDER BY artist", "SELECT \"a b\", year FROM concert AS c",
                "SELECT name as b1, 15 FROM singer WHERE name IN ('x', 'it''s') AND singer_id = 3", "SELECT name FROM singer ; "):
        writing = rule.start()
        for token in policy.tokenizer.encode(f"<think> x </think> {sql}", add_special_tokens=False):
            bits, known = writing.bits(), rule.known
            if bits is not None:
                rule.known = {}
                assert torch.equal(bits, writing.bits()), writing.text
                rule.known, checked = known, checked + 1
            writing.take(token)
    assert checked > 60 and len(rule.known) > 20


def test_a_token_that_opens_the_sql_may_begin_it(policy):
    """`>\\n` and `> SELECT` are one token in some vocabularies."""
    rules = NameRules(policy, {"music": SCHEMA}, AnswerFormat())
    pieces = {10: b"<think> x </think", 11: b"> SEL", 13: b"> foo"}
    for opening, over in ((11, False), (13, True)):
        writing = rules.of("music").start()
        writing.tokens = SimpleNamespace(decode_bytes=lambda ids: pieces[ids[0]], tokenize_bytes=rules.tokens.tokenize_bytes)
        writing.take(10)
        assert writing.bits() is None
        writing.take(opening)
        assert writing.over is over and (writing.bits() is None) is over


# ---- sampling under a rule


class Even:
    """A rule for tests: after a first token that is free, only even tokens until one below 6, then all again."""

    def start(self):
        return EvenWriting()


class EvenWriting:
    def __init__(self):
        self.taken = []

    def bits(self):
        if not self.taken or min(self.taken[1:], default=9) < 6:
            return None
        return torch.tensor([0x55555555, 0x55555555], dtype=torch.int32)

    def take(self, token):
        self.taken.append(token)


class Free:
    """A rule that allows everything."""

    def start(self):
        return SimpleNamespace(bits=lambda: None, take=lambda token: None)


def groups_under(rules, engine, model, temperature=0.8):
    prompts = [torch.arange(3, 9), torch.arange(4, 13), torch.arange(3, 9)]
    config = GRPOConfig(group_size=4, max_completion_tokens=12, temperature=temperature, kl_coef=0.0)
    return sample_groups(model, prompts, config, eos_ids=[EOS], seeds=[1, 2, 3], engine=engine, rules=rules), config


@pytest.mark.parametrize("engine", [PLAIN, FAST])
def test_samples_and_log_probabilities_are_of_the_allowed_tokens(engine, monkeypatch):
    """Against softmax over the allowed tokens alone, written out; in float64."""
    model, rules = make_model(), [Even(), Free(), Even()]
    groups, config = groups_under(rules, engine, model)
    checked = 0
    for group, rule in zip(groups, rules, strict=True):
        for completion, sampled, entropies in zip(group.completions, group.logps, group.entropies, strict=True):
            row = torch.cat([group.prompt, completion])
            logits = model(row[None]).logits[0, len(group.prompt) - 1:-1] / config.temperature  # [C, V]
            writing = EvenWriting()
            for t, token in enumerate(completion.tolist()):
                limited = isinstance(rule, Even) and writing.bits() is not None
                tokens = [i for i in range(logits.shape[1]) if i % 2 == 0] if limited else list(range(logits.shape[1]))
                p = logits[t, tokens].softmax(-1)
                assert token in tokens
                assert sampled[t].item() == pytest.approx(p[tokens.index(token)].log().item(), abs=2e-6)
                assert entropies[t].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)
                writing.take(token)
                checked += limited
    assert checked > 20
    flat = [(group.prompt, completion, rule) for group, rule in zip(groups, rules, strict=True) for completion in group.completions]
    for chunk in (LOGIT_CHUNK_ELEMENTS, 3 * model.config.vocab_size):  # at once, and three tokens at a time
        monkeypatch.setattr("engine.packing.LOGIT_CHUNK_ELEMENTS", chunk)
        logp = engine.logprobs(model, *map(list, zip(*(x[:2] for x in flat), strict=True)), config.temperature, [x[2] for x in flat])
        exact = PLAIN.logprobs(model, *map(list, zip(*(x[:2] for x in flat), strict=True)), config.temperature, [x[2] for x in flat])
        torch.testing.assert_close(logp, exact, atol=1e-10, rtol=0)
        sampled = torch.cat([values for group in groups for values in group.logps])
        found = torch.cat([row[:len(completion)] for row, (_, completion, _) in zip(logp, flat, strict=True)])
        torch.testing.assert_close(found.float(), sampled.float(), atol=2e-6, rtol=0)


def test_both_engines_sample_and_learn_the_same_under_rules():
    gradients = []
    for engine in (PLAIN, FAST):
        model, rules = make_model(), [Even(), Free(), Even()]
        groups, config = groups_under(rules, engine, model)
        batches = micro_batches(groups, torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        stats = policy_update(model, optimizer, batches, config, engine)
        assert stats["ratio_max"] == 1.0 and stats["sampler_gap"] < 1e-6
        without = [grpo.MicroBatch(b.prompts, b.completions, b.sampled_logps, b.advantages, b.mask, b.normalizer, [None] * 4) for b in batches]
        assert policy_update(model, optimizer, without, config, engine)["sampler_gap"] > 0.05  # what the rule accounts for
        policy_update(model, optimizer, micro_batches(groups, torch.ones(3, 4), config), config, engine)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        gradients.append([[c.tolist() for c in group.completions] for group in groups])
    torch.testing.assert_close(gradients[0], gradients[2], atol=1e-9, rtol=0)
    assert gradients[1] == gradients[3]


def test_greedy_takes_the_likeliest_allowed_token():
    model = make_model()
    (group, *_), config = groups_under([Even(), Free(), Free()], FAST, model, temperature=1.0)
    greedy, = sample_groups(model, [group.prompt], config, eos_ids=[EOS], group_size=1, temperature=0.0, engine=FAST, rules=[Even()])
    tokens = greedy.completions[0]
    logits = model(torch.cat([group.prompt, tokens])[None]).logits[0, len(group.prompt) - 1:-1]
    assert tokens[0] == logits[0].argmax()
    assert tokens[1] == 2 * logits[1, ::2].argmax()


# ---- on the command line


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """Flags of a short run of the little policy, on questions that it half knows."""
    pytest.importorskip("llguidance")
    from conftest import tiny_database

    folder = tmp_path_factory.mktemp("songs")
    records = [{"db_id": "music", "question": f"Which country has {name}?", "sql": f"SELECT country FROM singer WHERE name = '{name}'"}
               for name in ("Bo", "Ann", "Cy", "Di")]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    model = little_policy_folder(tiny_database(folder / "music.sqlite"))
    return ["--model", str(model), "--data", str(folder / "mine.jsonl"), "--threads", "1"]


def test_a_run_with_names_samples_only_names_and_hands_the_rule_on(songs, tmp_path):
    flags = [*songs, "--cold-start-steps", 0, "--steps", 2, "--prompts-per-step", 2, "--group-size", 24, "--temperature", 1.5, "--max-completion-tokens",
             40, "--eval-questions", 0, "--test-questions", 0, "--rewards", "format,execution", "--kl-coef", 0, "--prompt-style", "compact"]
    little = load_policy(songs[1])
    rule = NameRules(little, columns_of({"music": Path(songs[3]).with_name("music.sqlite")}), AnswerFormat()).of("music")
    strange = {}
    for constrain in ("none", "names"):
        folder = tmp_path / constrain
        status, out, errors = run_in_process(train, *flags, "--constrain", constrain, "--output", folder)
        assert status == 0, out + errors
        rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
        texts = [c["text"] for rollout in rollouts for c in rollout["completions"] if not c["truncated"] and "</think>" in c["text"]]
        strange[constrain] = sum(refused(little, rule, text) is not None for text in texts)
        assert len(texts) > 10
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert all(line["sampler_gap"] < 1e-4 and line["ratio_mean"] == 1.0 for line in metrics)
    assert strange["none"] > 3 and strange["names"] == 0, strange
    model = tmp_path / "names" / "checkpoints" / "step-2"
    found = {}
    for flag in ((), ("--constrain", "none")):
        file = tmp_path / f"{len(flag)}.json"
        status, out, errors = run_in_process(evaluate, "--model", model, *songs[2:], *flag, "--json", file)
        assert status == 0, out + errors
        found[len(flag)] = json.loads(file.read_text())["protocol"]["constrain"]
    assert found == {0: "names", 2: "none"}
    status, _, errors = run_in_process(evaluate, "--compare", tmp_path / "0.json", tmp_path / "2.json")
    assert status == 2 and "constrain (names and none)" in errors


def test_a_missing_llguidance_is_said_in_one_sentence(policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(UserError, match="--constrain needs llguidance: pip install -r requirements-extra.txt"):
        name_rules("names", policy, {}, AnswerFormat())
    assert name_rules("none", policy, {}, AnswerFormat()) is None


def test_forbidden_tokens_have_no_logit():
    logits = torch.arange(80.0).view(2, 40)
    bits = torch.tensor([0b101, 1 << 7], dtype=torch.int32)
    found = variants.forbid(logits, [None, bits])
    assert torch.equal(found[0], logits[0])
    assert [i for i in range(40) if found[1, i] > -math.inf] == [0, 2, 39]
    assert variants.forbid(logits, []) is logits and variants.forbid(logits, [None, None]) is logits
