"""Spider's difficulty of a query: easy, medium, hard or extra, by the official counting rules.

Three counts decide, all of the outermost query (A in `A UNION B`):

  components   WHERE, GROUP BY, ORDER BY, LIMIT (one each), each joined table, each OR and each LIKE
  nestings     subqueries in conditions (ON, WHERE, HAVING), and one for a set operation
  others       one each for: several aggregates, several SELECT items, several WHERE conditions,
               several GROUP BY columns

Two oddities of the official rules are kept, because papers report its counts: a NOT in WHERE or HAVING
and each AND or OR in HAVING counts as an aggregate, while an aggregate inside HAVING does not.

Written on the flat tokens of atomic.py, so a query that the official parser rejects still gets a level.
"""

from sqlparse import tokens as T

from partial_credit.atomic import SET_OPERATIONS, Unparsable, is_comment, lex, split_tokens

LEVELS = ("easy", "medium", "hard", "extra")
AGGREGATES = ("max", "min", "count", "sum", "avg")
CLAUSES = ("select", "from", "where", "group", "having", "order", "limit")


def hardness(sql: str) -> str:
    """The level of a query: one of LEVELS."""
    clauses, nestings = split_clauses(nest(flat_words(sql)))
    conditions = clauses["from"] + clauses["where"] + clauses["having"]
    components = sum(bool(clauses[name]) for name in ("where", "group", "order", "limit"))
    components += max(0, count_tables(clauses["from"]) - 1)
    components += sum(word in ("or", "like") for word in plain(conditions))
    nestings += count_subqueries(clauses["where"]) + count_subqueries(clauses["having"])
    nestings += count_subqueries(clauses["from"]) - count_derived_tables(clauses["from"])
    return level(components, nestings, count_others(clauses))


def level(components: int, nestings: int, others: int) -> str:
    """The official decision table."""
    if nestings == 0:
        if components <= 1 and others == 0:
            return "easy"
        if (components <= 1 and others <= 2) or (components <= 2 and others < 2):
            return "medium"
        if (components <= 2 and others > 2) or (components == 3 and others <= 2):
            return "hard"
    elif nestings == 1 and components <= 1 and others == 0:
        return "hard"
    return "extra"


def count_others(clauses) -> int:
    """How many of select items, where conditions, group-by columns and aggregates are more than one."""
    items = split_commas(clauses["select"])
    having = connectors(clauses["having"])
    aggregates = sum(item[0] in AGGREGATES for item in items if item)
    aggregates += sum(word in AGGREGATES for word in plain(clauses["order"]))
    aggregates += negations(clauses["where"]) + negations(clauses["having"]) + having
    return ((aggregates > 1) + (len(items) > 1) + (connectors(clauses["where"]) > 0)
            + (len(split_commas(clauses["group"])) > 1))


# ------------------------------------------------------------------------- from text to nested words

def flat_words(sql: str) -> list[str]:
    """Lower-case words and signs; strings and quoted names become one neutral word."""
    words = []
    for kind, text in lex(sql):
        if text.isspace() or is_comment(kind, text):
            continue
        quoted = kind in T.String or text[0] in "'\"`["
        words += ["?"] if quoted or (words and words[-1] == ".") else text.lower().split()
    return words


def nest(words: list[str]) -> list:
    """Parentheses become lists."""
    stack = [[]]
    for word in words:
        if word == "(":
            stack.append([])
        elif word == ")" and len(stack) > 1:
            inner = stack.pop()
            stack[-1].append(inner)
        else:
            stack[-1].append(word)
    while len(stack) > 1:
        inner = stack.pop()
        stack[-1].append(inner)
    return stack[0]


def split_clauses(query: list) -> tuple[dict[str, list], int]:
    """The words of each clause of the outermost query, and 1 if a set operation follows it, else 0."""
    clauses = {name: [] for name in CLAUSES}
    current = clauses["select"]
    for number, word in enumerate(query):
        if isinstance(word, str) and word in SET_OPERATIONS:
            return clauses, 1
        if number == 0 and is_query(word):  # (SELECT ...) UNION ...
            clauses, _ = split_clauses(word)
        elif isinstance(word, str) and word in CLAUSES:
            current = clauses[word]
        elif word not in ("by", ";", "distinct"):
            current.append(word)
    return clauses, 0


def is_query(word) -> bool:
    """True for a subquery: a list that begins with SELECT, or with such a list."""
    return isinstance(word, list) and bool(word) and (word[0] == "select" or is_query(word[0]))


# ------------------------------------------------------------------------------------------- counting

def plain(words: list) -> list[str]:
    """The words outside subqueries; other parentheses are flattened."""
    opened = []
    for word in words:
        if isinstance(word, str):
            opened.append(word)
        elif not is_query(word):
            opened += plain(word)
    return opened


def count_subqueries(words: list) -> int:
    """Subqueries at this level, without those nested inside them."""
    return sum(1 if is_query(word) else count_subqueries(word) for word in words if isinstance(word, list))


def count_tables(words: list) -> int:
    """Tables and subqueries that FROM joins."""
    return 1 + sum(word in ("join", ",") for word in words) if words else 0


def joins_in(sql: str) -> int:
    """The number of tables and subqueries that FROM clauses join to their first, by JOIN or by a comma, in all queries
    of a statement; 0 if it has too many tokens to be read."""
    clauses, found = [""], 0  # the clause at each depth
    try:
        words = split_tokens(sql)
    except Unparsable:
        return 0
    for word in words:
        if word == "(":
            clauses.append("")
        elif word == ")":
            clauses = clauses[:-1] or [""]
        elif word in CLAUSES or word in SET_OPERATIONS:
            clauses[-1] = word
        else:
            found += word == "join" or word == "," and clauses[-1] == "from"
    return found


def count_derived_tables(words: list) -> int:
    """Subqueries that stand for a table in FROM."""
    return sum(is_query(word) and before in ("", "join", ",")
               for before, word in zip(["", *words], words, strict=False))


def connectors(words: list) -> int:
    """ANDs and ORs between conditions; the AND of a BETWEEN does not count."""
    flat = plain(words)
    return sum(word in ("and", "or") for word in flat) - flat.count("between")


def negations(words: list) -> int:
    """NOT IN, NOT LIKE, NOT BETWEEN; the NOT of IS NOT is part of the operator."""
    flat = plain(words)
    return sum(word == "not" and before != "is" for before, word in zip(["", *flat], flat, strict=False))


def split_commas(words: list) -> list[list]:
    """The items of a comma-separated clause; none for an absent clause."""
    items = [[]] if words else []
    for word in words:
        if word == ",":
            items.append([])
        else:
            items[-1].append(word)
    return items
