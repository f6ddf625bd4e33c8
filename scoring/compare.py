"""Two evaluations side by side: the difference with its interval, and the questions whose verdict flipped. Several such
pairs, one per seed: the mean difference, with its interval over seeds and questions."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import numpy as np

from common.errors import UserError, parse_json, read_text, visible
from questions.example import unique_ids
from scoring.verdicts import bootstrap_interval, crossed_interval, mean
from sql_exec import MATCHES


def load_scores(file) -> dict:
    """The content of a --json file."""
    content = parse_json(read_text(Path(file)), file)
    examples = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(examples, list) or not all(
            isinstance(item, dict) and {"id", "db_id", "gold_status"} <= item.keys() for item in examples):
        raise UserError(f"{file} is not a file that evaluate.py --json wrote")
    return content


def by_question(examples: Sequence[dict]) -> dict[tuple, dict]:
    """{(id, db_id, number of earlier ones with the same ids): the question's record in --json}."""
    found, seen = {}, Counter()
    for item in examples:
        key = item["id"], item["db_id"]
        found[*key, seen[key]] = item
        seen[key] += 1
    return found


def differing(a: dict, b: dict) -> list[str]:
    """The settings in which two evaluations' protocols differ, in words; only those that both state."""
    a, b = a.get("protocol"), b.get("protocol")
    if not isinstance(a, dict) or not isinstance(b, dict):
        return []
    return [f"{name.replace('_', ' ')} ({a[name]} and {b[name]})" for name in a if name in b and a[name] != b[name]]


def compare(file_a, file_b, anyway: bool = False) -> dict:
    """Accuracies of two evaluations on the questions they share, and the questions whose verdict flipped.

    Raises:
        UserError: evaluate.py did not write a file, they share no question or comparison, or, unless `anyway`, they
            were measured differently.
    """
    a, b = load_scores(file_a), load_scores(file_b)
    if not anyway and (differences := differing(a, b)):
        raise UserError(f"{file_a} and {file_b} were measured differently: {'; '.join(differences)}; measure them "
                        "alike, or give --anyway")
    in_a, in_b = by_question(a["examples"]), by_question(b["examples"])
    skip = a.get("bad_golds_skipped") or b.get("bad_golds_skipped")
    unavailable = {key for side in (in_a, in_b) for key, item in side.items() if item.get("status") == "unavailable"}
    both = [key for key in in_a if key in in_b and key not in unavailable]
    shared = [key for key in both
              if not (skip and any(side[key]["gold_status"] not in ("ok", "empty") for side in (in_a, in_b)))]
    if not shared:
        raise UserError(f"{file_a} and {file_b} have no question in common")
    labels = dict(zip(shared, unique_ids([str(key[0]) for key in shared]), strict=True))
    known = {key: in_a[key].get("twins") or in_b[key].get("twins") for key in shared}
    databases, twins = [db_id for _, db_id, _ in shared], [(key[1], known[key] or key) for key in shared]
    matches = {}
    for name in MATCHES:
        if not all(name in item for item in (in_a[shared[0]], in_b[shared[0]])):
            continue
        pairs = [(in_a[key][name], in_b[key][name]) for key in shared]
        difference = [after - before for before, after in pairs]  # paired: by question
        matches[name] = {
            "a": mean([before for before, _ in pairs]), "b": mean([after for _, after in pairs]),
            "difference": mean(difference), "interval": bootstrap_interval(difference, twins, span=(-1.0, 1.0)),
            "interval_over_databases": (bootstrap_interval(difference, databases, span=(-1.0, 1.0))
                                        if len(set(databases)) > 1 else None),
            "gained": [labels[key] for key, change in zip(shared, difference, strict=True) if change > 0],
            "lost": [labels[key] for key, change in zip(shared, difference, strict=True) if change < 0]}
    if not matches:
        raise UserError(f"{file_a} and {file_b} have no comparison in common")
    sql = {labels[key]: [side[key].get("sql", "") for side in (in_a, in_b)] for key in shared}
    number = {}
    groups = {labels[key]: number.setdefault(twin, len(number)) for key, twin in zip(shared, twins, strict=True)}
    return {"a": str(file_a), "b": str(file_b), "n": len(shared), "groups": groups, "twins_known": all(known.values()),
            "twin_groups": len(set(twins)), "databases": len(set(databases)), "matches": matches, "sql": sql,
            "only_in_one": len(in_a.keys() ^ in_b.keys()), "unavailable": len(unavailable),
            "bad_golds": len(both) - len(shared)}


def compare_seeds(files: Sequence, anyway: bool = False) -> dict:
    """`compare` of each pair [A of seed 0, B of seed 0, A of seed 1, …], and over all of them the mean difference.

    Raises:
        UserError: as `compare`; an odd number of files; pairs with different questions.
    """
    if len(files) < 2 or len(files) % 2:
        raise UserError(f"--compare takes pairs of files, A and B of each seed, but was given {len(files)}")
    pairs = [compare(*pair, anyway) for pair in zip(files[::2], files[1::2], strict=True)]
    for pair in pairs:
        if pair["groups"] != pairs[0]["groups"] or pair["matches"].keys() != pairs[0]["matches"].keys():
            raise UserError(f"{pair['a']} and {pairs[0]['a']} are evaluations of different questions")
    members = list(pairs[0]["groups"].values())
    over_seeds = {}
    for name in pairs[0]["matches"]:
        changes = np.zeros((len(pairs), max(members) + 1), int)  # of right answers, per seed and group of twins
        for row, pair in zip(changes, pairs, strict=True):
            for verb, sign in (("gained", 1), ("lost", -1)):
                np.add.at(row, [pair["groups"][label] for label in pair["matches"][name][verb]], sign)
        over_seeds[name] = {**{side: mean([pair["matches"][name][side] for pair in pairs])
                               for side in ("a", "b", "difference")},
                            "interval": crossed_interval(changes, np.bincount(members))}
    return {"pairs": pairs, "over_seeds": over_seeds}


def print_seeds(result: dict) -> None:
    """A line per pair, and the mean over all."""
    rows = [(f"{pair['a']}, {pair['b']}", pair["matches"]) for pair in result["pairs"]]
    rows.append((f"mean of {len(rows)}, over seeds and questions", result["over_seeds"]))
    for name in result["over_seeds"]:
        print(f"{f'{name}, %':<39}{'A':>7}{'B':>7}{'B - A [95 % interval]':>27}")
        for label, matches in rows:
            low, high = matches[name]["interval"]
            a, b, difference = (100 * matches[name][side] for side in ("a", "b", "difference"))
            if len(label) > 39:
                print(label)
            change = f"{difference:+.1f} [{100 * low:+6.1f},{100 * high:+6.1f}]"
            print(f"{label if len(label) <= 39 else '':<39}{a:>7.1f}{b:>7.1f}{change:>27}")


def print_comparison(result: dict) -> None:
    """Two evaluations side by side, and every question that flipped."""
    print(f"A: {result['a']}\nB: {result['b']}\n{result['n']} questions"
          + (f"; {result['only_in_one']} are in one file only" if result["only_in_one"] else "")
          + (f"; {result['unavailable']} are left out, since their database could not be read"
             if result["unavailable"] else "")
          + (f"; {result['bad_golds']} are left out, since\ntheir gold query fails and --skip-bad-gold was given"
             if result["bad_golds"] else ""))
    print(f"{'execution accuracy, %':<24}{'A':>7}{'B':>7}{'B - A [95 % interval]':>26}"
          f"{'gained':>8}{'lost':>6}")
    for name, part in result["matches"].items():
        low, high = part["interval"]
        change = f"{100 * part['difference']:+.1f} [{100 * low:+6.1f},{100 * high:+6.1f}]"
        print(f"{name:<24}{100 * part['a']:>7.1f}{100 * part['b']:>7.1f}{change:>26}"
              f"{len(part['gained']):>8}{len(part['lost']):>6}")
        if part["interval_over_databases"]:
            low, high = part["interval_over_databases"]
            print(f"{'  over ' + str(result['databases']) + ' databases':<38}"
                  f"{f'[{100 * low:+6.1f},{100 * high:+6.1f}]':>26}")
    if not result["twins_known"]:
        print("intervals are over single questions: these files do not say which of them share a\ngold query")
    elif result["twin_groups"] < result["n"]:
        print(f"intervals draw questions that share a gold query together: {result['twin_groups']} groups")
    for name, part in result["matches"].items():
        for verb in ("gained", "lost"):
            for identity in part[verb]:
                print(f"\n{verb} ({name}): question {visible(identity)}")
                for side, sql in zip("AB", result["sql"][identity], strict=True):
                    if sql:
                        print(f"  {side}: {shorten(visible(sql), 75)}")
