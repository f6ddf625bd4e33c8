"""The demo world: small SQLite databases and questions about them, all drawn from one seed.

It replaces Spider or BIRD where nothing can be downloaded. Ten databases are used in training, four are
held out ("unseen"). Questions come in four balanced tiers:

    simple   one table: filters, counts, aggregates
    group    GROUP BY, HAVING, ORDER BY ... LIMIT
    join     two tables over their foreign key
    nested   subqueries, INTERSECT, EXCEPT, UNION

and in five splits. `cold` has the reasoning traces of an unverified teacher: many simple ones, which are right, and few
of the upper tiers, in plain words. Many of the latter end in a slip that is common in Text-to-SQL (a column too many or
too few, a join where EXISTS is meant, AND for INTERSECT). A policy trained on it can copy names and values, but makes
the teacher's mistakes, and has seen synonyms (OTHER_WORDS) only in simple questions. `train` has gold SQL for questions
in all wordings, and no traces: GRPO learns from it. `dev` chooses, `test` reports: their gold SQL occurs in no other
split. `unseen` asks about the held-out databases.
"""

import hashlib
import os
import random
import re
import shutil
import sqlite3
import tempfile
from dataclasses import dataclass
from pathlib import Path

VARIETY = 0.4  # probability that another word replaces a plain one, outside `cold`
TIERS = ("simple", "group", "join", "nested")
SPLITS = ("cold", "train", "dev", "test", "unseen")

# Questions per split and tier. The upper tiers of `cold` are scarce on purpose; see the module docstring.
SIZES = {
    "cold": {"simple": 1500, "group": 250, "join": 250, "nested": 250},
    "train": dict.fromkeys(TIERS, 1000),
    "dev": dict.fromkeys(TIERS, 40),
    "test": dict.fromkeys(TIERS, 100),
    "unseen": dict.fromkeys(TIERS, 30),
}
# How often the teacher slips in the upper tiers of `cold`; all else is the same. In `hard` a cold-started policy copies
# the slips: it is right on under a tenth of the upper tiers, and in most groups all completions are wrong.
WORLDS = {"default": 0.5, "hard": 0.9}

POOLS = {
    "person": "Ada Ben Cleo Dan Eva Finn Gina Hugo Ida Jack Kira Leo Mia Nora Omar Paul Rosa Sam Tara Ugo Vera Will "
    "Yara Zack Anna Boris Carla David Elsa Frank Grace Henry Irene James Karen Lucas Maria Nick Olga Peter",
    "city": "Rome Paris Oslo Lima Cairo Delhi Tokyo Quito Berlin Madrid Lisbon Vienna Dublin Prague Athens Boston "
    "Dallas Denver Geneva Havana Kyoto London Manila Milan Moscow Naples Seoul Sydney Tunis Warsaw",
    "country": "France Italy Spain Norway Peru Egypt India Japan Brazil Chile China Cuba Greece Ireland Kenya Mexico "
    "Nepal Poland Sweden Turkey Canada Ghana Iceland Malta",
    "colour": "red blue green black white yellow brown orange purple pink grey silver",
    "genre": "rock jazz folk opera drama comedy horror crime poetry history fantasy western",
    "product": "lamp chair table phone camera radio clock mirror carpet bottle basket ladder hammer candle pillow kettle",
    "subject": "maths physics biology chemistry music art latin sport geography economics law medicine",
    "material": "wood steel glass stone paper wool cotton silk copper bronze marble leather",
    "crop": "wheat rice corn barley oats beans grapes apples olives potatoes onions carrots",
    "animal": "lion tiger bear wolf zebra camel eagle parrot snake monkey panda rabbit",
    "dish": "soup salad pasta pizza curry stew burger noodles omelette pancake risotto tacos",
    "illness": "flu asthma fever cough migraine anemia allergy fracture burn rash",
    "role": "goalkeeper defender striker captain coach winger",
    "level": "junior senior expert trainee chief",
    "maker": "Volta Nimbus Orion Zenith Apex Delta Falcon Comet Titan Lotus",
}

# One line per database: its parent table, then child tables (each has a foreign key to the parent).
# A column is name:pool or name:low-high (integers). Tables of one database share no column except the key.
SEEN = {
    "music": "singer name:person country:country age:18-80 albums:1-40 / concert city:city year:1990-2024 tickets:100-950",
    "shop": "customer name:person city:city age:18-90 / purchase product:product price:5-500 quantity:1-30",
    "school": "teacher name:person subject:subject wage:200-900 / course title:genre credits:1-20 students:5-95",
    "travel": "airline company:maker country:country planes:5-90 / flight city:city distance:100-990 seats:20-400",
    "library": "author name:person country:country born:1900-2000 / book genre:genre pages:50-950 price:5-90",
    "league": "team city:city founded:1880-2010 wins:1-60 / player name:person role:role goals:1-90 wage:200-900",
    "clinic": "doctor name:person level:level wage:300-950 / visit illness:illness cost:10-700 year:2000-2024",
    "farming": "farm owner:person country:country size:10-600 / field crop:crop area:1-90 harvest:10-900",
    "gallery": "museum city:city opened:1800-2020 rooms:3-80 / painting artist:person colour:colour price:50-990",
    "cinema": "director name:person country:country awards:1-25 / film genre:genre year:1950-2024 minutes:60-240",
}
UNSEEN = {
    "factory": "machine maker:maker city:city power:10-900 / part material:material weight:1-90 price:5-500",
    "zoo": "keeper name:person level:level age:18-70 / cage animal:animal size:5-300 visitors:10-950",
    "cafe": "kitchen city:city opened:1950-2020 seats:10-200 / meal dish:dish price:3-60 minutes:5-90",
    "garage": "mechanic name:person country:country wage:200-900 / car colour:colour year:1980-2024 cost:10-950",
}

# Synonyms. The upper tiers of `cold` use only the plain words. All other questions mix these in, with probability
# VARIETY, so that their meaning must be learned from query results.
OTHER_WORDS = {
    # tables
    "singers": "vocalists", "concerts": "gigs", "customers": "clients", "purchases": "orders", "teachers": "instructors",
    "courses": "classes", "airlines": "carriers", "flights": "trips", "authors": "writers", "books": "volumes",
    "teams": "clubs", "players": "athletes", "doctors": "physicians", "visits": "appointments", "farms": "estates",
    "fields": "plots", "museums": "galleries", "paintings": "pictures", "directors": "filmmakers", "films": "movies",
    # columns
    "albums": "records", "tickets": "admissions", "quantity": "amount", "wage": "salary pay", "credits": "points",
    "students": "pupils", "planes": "aircraft", "distance": "mileage", "seats": "places", "born": "birthyear",
    "pages": "length", "price": "cost charge", "founded": "established", "wins": "victories", "goals": "scores",
    "size": "extent", "area": "surface", "harvest": "yield", "opened": "inaugurated", "rooms": "halls",
    "awards": "prizes", "minutes": "duration", "age": "years", "year": "date", "name": "label", "country": "nation",
    "city": "town", "genre": "style", "colour": "shade", "product": "article", "subject": "discipline",
    "title": "heading", "company": "firm", "role": "position", "level": "rank", "illness": "disease", "owner": "holder",
    "crop": "plant", "artist": "painter",
    # comparisons, aggregates, orders
    "above": "over beyond exceeding", "below": "under beneath short_of", "average": "mean typical",
    "highest": "maximum greatest top", "lowest": "minimum least bottom", "total": "summed combined overall",
    "most": "largest_number_of", "fewest": "smallest_number_of",
    # verbs
    "Show": "List Report Find", "different": "distinct various",
}


@dataclass(frozen=True)
class DemoTable:
    name: str
    key: str
    texts: tuple[str, ...]  # text columns, the identifying one first
    numbers: tuple[str, ...]
    pools: dict  # text column -> tuple of values; number column -> (low, high)
    parent: "DemoTable | None" = None


def parse_tables(line: str) -> list[DemoTable]:
    """Reads one line of SEEN or UNSEEN into its tables, the parent first."""
    tables: list[DemoTable] = []
    for part in line.split("/"):
        name, *columns = part.split()
        pools = {}
        for column in columns:
            field, pool = column.split(":")
            low, _, high = pool.partition("-")
            pools[field] = (int(low), int(high)) if high else tuple(POOLS[pool].split())
        texts = tuple(field for field, pool in pools.items() if isinstance(pool[0], str))
        numbers = tuple(field for field in pools if field not in texts)
        parent = tables[0] if tables else None
        tables.append(DemoTable(name, f"{name}_id", texts, numbers, pools, parent))
    return tables


# ---------------------------------------------------------------------------------------------- databases


def build_database(path: Path, tables: list[DemoTable], rng: random.Random) -> None:
    """Creates the SQLite file of one database: 24 rows in the parent table, 60 in each child table."""
    with sqlite3.connect(path) as connection:
        for table in tables:
            columns = [f"{table.key} INTEGER PRIMARY KEY"]
            if table.parent:
                key = table.parent.key
                columns.append(f"{key} INTEGER REFERENCES {table.parent.name} ({key})")
            columns += [f"{c} {'TEXT' if c in table.texts else 'INTEGER'}" for c in table.pools]
            connection.execute(f"CREATE TABLE {table.name} ({', '.join(columns)})")
            for row in _rows(table, rng):
                connection.execute(f"INSERT INTO {table.name} VALUES ({', '.join('?' * len(row))})", row)
    connection.close()


def _rows(table: DemoTable, rng: random.Random) -> list[tuple]:
    count = 60 if table.parent else 24
    columns = []
    for column, pool in table.pools.items():
        if column in table.numbers:
            columns.append([rng.randint(*pool) for _ in range(count)])
        elif column == table.texts[0] and not table.parent:  # the first text column identifies a parent
            columns.append(rng.sample(pool, count) if len(pool) >= count else rng.choices(pool, k=count))
        else:  # few distinct values, so that groups have several rows
            columns.append(rng.choices(rng.sample(pool, min(len(pool), 9)), k=count))
    keys = [[i + 1 for i in range(count)]]
    if table.parent:  # the last five parents have no children
        keys.append([rng.randint(1, 19) for _ in range(count)])
    return list(zip(*keys, *columns, strict=True))


# ---------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Condition:
    words: str  # "whose country is France"
    column: str  # "country"
    sql: str  # "country = 'France'"


class Phrasing:
    """Draws columns, conditions and wordings for one database; `plain` uses only the plain words."""

    def __init__(self, tables: list[DemoTable], connection: sqlite3.Connection, rng: random.Random, plain: bool):
        self.tables, self.connection, self.rng, self.plain = tables, connection, rng, plain

    def say(self, word: str) -> str:
        """A word or, unless `plain`, with probability VARIETY a synonym."""
        others = OTHER_WORDS.get(word, "").split()
        if self.plain or not others or self.rng.random() > VARIETY:
            return word
        return self.rng.choice(others).replace("_", " ")

    def either(self, one: str, other: str) -> str:
        """One of two ways to start a question; both occur in every split."""
        return self.rng.choice([one, other])

    def many(self, table: DemoTable) -> str:
        """The rows of a table, `cities`."""
        return self.say(table.name[:-1] + "ies" if table.name.endswith("y") else table.name + "s")

    def value(self, table: DemoTable, column: str):
        rows = self.connection.execute(f"SELECT {column} FROM {table.name}").fetchall()
        return self.rng.choice(rows)[0]

    def equals(self, table: DemoTable) -> Condition:
        column = self.rng.choice(table.texts)
        value = self.value(table, column)
        return Condition(f"whose {self.say(column)} is {value}", column, f"{column} = '{value}'")

    def compares(self, table: DemoTable, operators: str = "><") -> Condition:
        column, operator = self.rng.choice(table.numbers), self.rng.choice(operators)
        bound, word = self.bound(table, column), self.say("above" if operator == ">" else "below")
        return Condition(f"whose {self.say(column)} is {word} {bound}", column, f"{column} {operator} {bound}")

    def bound(self, table: DemoTable, column: str) -> int:
        """A number to compare with: a cell of the column, rounded as people do (to 10, 5 or not at all)."""
        low, high = table.pools[column]
        step = 10 if high - low > 100 else 5 if high - low > 40 else 1
        return round(self.value(table, column) / step) * step

    def condition(self, table: DemoTable) -> Condition:
        return self.rng.choice([self.equals, self.compares])(table)

    def aggregate(self, table: DemoTable) -> tuple[str, str]:
        column = self.rng.choice(table.numbers)
        function, word = self.rng.choice([("AVG", "average"), ("MAX", "highest"), ("MIN", "lowest"), ("SUM", "total")])
        return f"{self.say(word)} {self.say(column)}", f"{function}( {column} )"

    def direction(self) -> tuple[str, str]:
        word, order = self.rng.choice([("highest", "DESC"), ("lowest", "ASC")])
        return self.say(word), order

    def show(self) -> str:
        return self.say("Show")


# Each form returns (question, SQL, reasoning) and, in the upper tiers, (SQL, reasoning) of a slip. `p` draws words, `t`
# is a table, `c` a child table.


def simple_list(p, t):
    column, where = p.rng.choice(t.texts + t.numbers), p.condition(t)
    return (f"{p.show()} the {p.say(column)} of {p.many(t)} {where.words} ?",
            f"SELECT {column} FROM {t.name} WHERE {where.sql}",
            f"table {t.name} ; keep {where.sql} ; show {column}")


def simple_count(p, t):
    where = p.condition(t)
    start = p.either(f"How many {p.many(t)} are there", f"Count the {p.many(t)}")
    return (f"{start} {where.words} ?", f"SELECT COUNT(*) FROM {t.name} WHERE {where.sql}",
            f"table {t.name} ; keep {where.sql} ; count rows")


def simple_aggregate(p, t):
    (words, sql), where = p.aggregate(t), p.condition(t)
    return (f"{p.show()} the {words} of {p.many(t)} {where.words} ?",
            f"SELECT {sql} FROM {t.name} WHERE {where.sql}",
            f"table {t.name} ; keep {where.sql} ; compute {sql}")


def simple_both(p, t):
    column, first, second = p.rng.choice(t.texts), p.equals(t), p.compares(t)
    return (f"{p.show()} the {p.say(column)} of {p.many(t)} {first.words} and {second.words} ?",
            f"SELECT {column} FROM {t.name} WHERE {first.sql} AND {second.sql}",
            f"table {t.name} ; keep {first.sql} and {second.sql} ; show {column}")


def simple_distinct(p, t):
    column, where = p.rng.choice(t.texts), p.compares(t)
    return (f"{p.show()} the {p.say('different')} {p.say(column)} values of {p.many(t)} {where.words} ?",
            f"SELECT DISTINCT {column} FROM {t.name} WHERE {where.sql}",
            f"table {t.name} ; keep {where.sql} ; show distinct {column}")


def group_count(p, t):
    column, where = p.rng.choice(t.texts), p.compares(t)
    start = p.either(f"For each {p.say(column)} , how many {p.many(t)} are there",
                     f"Count by {p.say(column)} the {p.many(t)}")
    return (f"{start} {where.words} ?",
            f"SELECT {column}, COUNT(*) FROM {t.name} WHERE {where.sql} GROUP BY {column}",
            f"table {t.name} ; keep {where.sql} ; group by {column} ; show {column} and count",
            f"SELECT COUNT(*) FROM {t.name} WHERE {where.sql} GROUP BY {column}",
            f"table {t.name} ; keep {where.sql} ; group by {column} ; show count")


def group_aggregate(p, t):
    column, (words, sql), where = p.rng.choice(t.texts), p.aggregate(t), p.compares(t)
    start = p.either(f"For each {p.say(column)} , {p.show().lower()} the {words}",
                     f"{p.show()} the {words} by {p.say(column)}")
    return (f"{start} of {p.many(t)} {where.words} ?",
            f"SELECT {column}, {sql} FROM {t.name} WHERE {where.sql} GROUP BY {column}",
            f"table {t.name} ; keep {where.sql} ; group by {column} ; show {column} and {sql}",
            f"SELECT {sql} FROM {t.name} WHERE {where.sql} GROUP BY {column}",
            f"table {t.name} ; keep {where.sql} ; group by {column} ; show {sql}")


def group_having(p, t):
    column, (words, sql) = p.rng.choice(t.texts), p.aggregate(t)
    bound = p.rng.choice(p.connection.execute(f"SELECT {sql} FROM {t.name} GROUP BY {column}").fetchall())[0]
    bound = round(bound / 10) * 10
    operator, comparison = p.rng.choice([(">", "above"), ("<", "below")])
    start = p.either(f"Which {p.say(column)} values have", f"{p.show()} each {p.say(column)} that has")
    return (f"{start} a {words} of {p.many(t)} {p.say(comparison)} {bound} ?",
            f"SELECT {column} FROM {t.name} GROUP BY {column} HAVING {sql} {operator} {bound}",
            f"table {t.name} ; group by {column} ; keep groups {sql} {operator} {bound} ; show {column}",
            f"SELECT {column}, {sql} FROM {t.name} GROUP BY {column} HAVING {sql} {operator} {bound}",
            f"table {t.name} ; group by {column} ; keep groups {sql} {operator} {bound} ; show {column} and {sql}")


def group_top(p, t):
    column, number, where, (word, order) = p.rng.choice(t.texts), p.rng.choice(t.numbers), p.condition(t), p.direction()
    return (f"Of the {p.many(t)} {where.words} , {p.show().lower()} the {p.say(column)} of the one with the {word} {p.say(number)} ?",
            f"SELECT {column} FROM {t.name} WHERE {where.sql} ORDER BY {number} {order} LIMIT 1",
            f"table {t.name} ; keep {where.sql} ; order by {number} {order} limit 1 ; show {column}",
            f"SELECT {column}, {number} FROM {t.name} WHERE {where.sql} ORDER BY {number} {order} LIMIT 1",
            f"table {t.name} ; keep {where.sql} ; order by {number} {order} limit 1 ; show {column} and {number}")


def group_ranked(p, t):
    column, number, (word, order), k = p.rng.choice(t.texts), p.rng.choice(t.numbers), p.direction(), p.rng.randint(2, 6)
    return (f"{p.show()} the {p.say(column)} of the {k} {p.many(t)} with the {word} {p.say(number)} ?",
            f"SELECT {column} FROM {t.name} ORDER BY {number} {order} LIMIT {k}",
            f"table {t.name} ; order by {number} {order} limit {k} ; show {column}",
            f"SELECT {column}, {number} FROM {t.name} ORDER BY {number} {order} LIMIT {k}",
            f"table {t.name} ; order by {number} {order} limit {k} ; show {column} and {number}")


def group_common(p, t):
    column, where = p.rng.choice(t.texts), p.compares(t)
    word, order = p.rng.choice([("most", "DESC"), ("fewest", "ASC")])
    return (f"Which {p.say(column)} has the {p.say(word)} {p.many(t)} {where.words} ?",
            f"SELECT {column} FROM {t.name} WHERE {where.sql} GROUP BY {column} ORDER BY COUNT(*) {order} LIMIT 1",
            f"table {t.name} ; keep {where.sql} ; group by {column} ; order by count {order} limit 1 ; show {column}",
            f"SELECT {column}, COUNT(*) FROM {t.name} WHERE {where.sql} GROUP BY {column} ORDER BY COUNT(*) {order} LIMIT 1",
            f"table {t.name} ; keep {where.sql} ; group by {column} ; order by count {order} limit 1 ; show {column} and count")


def _joined(c) -> str:
    return f"{c.parent.name} JOIN {c.name} USING ( {c.parent.key} )"


def join_list(p, c):
    parent, columns = c.parent, c.texts + c.numbers
    column, where = p.rng.choice(columns), p.condition(parent)
    return (f"{p.show()} the {p.say(column)} of {p.many(c)} of {p.many(parent)} {where.words} ?",
            f"SELECT {column} FROM {_joined(c)} WHERE {where.sql}",
            f"join {parent.name} and {c.name} ; keep {where.sql} ; show {column}",
            f"SELECT {column}, {where.column} FROM {_joined(c)} WHERE {where.sql}",
            f"join {parent.name} and {c.name} ; keep {where.sql} ; show {column} and {where.column}")


def join_count(p, c):
    parent, where = c.parent, p.condition(c.parent)
    start = p.either(f"How many {p.many(c)} belong to {p.many(parent)}", f"Count the {p.many(c)} of {p.many(parent)}")
    return (f"{start} {where.words} ?", f"SELECT COUNT(*) FROM {_joined(c)} WHERE {where.sql}",
            f"join {parent.name} and {c.name} ; keep {where.sql} ; count rows",
            f"SELECT COUNT(*) FROM {parent.name} WHERE {where.sql}",
            f"table {parent.name} ; keep {where.sql} ; count rows")


def join_aggregate(p, c):
    parent, (words, sql), where = c.parent, p.aggregate(c), p.condition(c.parent)
    return (f"{p.show()} the {words} of {p.many(c)} of {p.many(parent)} {where.words} ?",
            f"SELECT {sql} FROM {_joined(c)} WHERE {where.sql}",
            f"join {parent.name} and {c.name} ; keep {where.sql} ; show {sql}",
            f"SELECT {where.column}, {sql} FROM {_joined(c)} WHERE {where.sql}",
            f"join {parent.name} and {c.name} ; keep {where.sql} ; show {where.column} and {sql}")


def join_parents(p, c):
    parent, column, where = c.parent, p.rng.choice(c.parent.texts), p.condition(c)
    return (f"{p.show()} the {p.say('different')} {p.say(column)} values of {p.many(parent)} having {p.many(c)} {where.words} ?",
            f"SELECT DISTINCT {column} FROM {_joined(c)} WHERE {where.sql}",
            f"join {parent.name} and {c.name} ; keep {where.sql} ; show distinct {column}",
            f"SELECT DISTINCT {column}, {where.column} FROM {_joined(c)} WHERE {where.sql}",
            f"join {parent.name} and {c.name} ; keep {where.sql} ; show distinct {column} and {where.column}")


def join_grouped(p, c):
    parent, column, where = c.parent, p.rng.choice(c.parent.texts), p.condition(c)
    return (f"For each {p.say(column)} of {p.many(parent)} , how many {p.many(c)} are there {where.words} ?",
            f"SELECT {column}, COUNT(*) FROM {_joined(c)} WHERE {where.sql} GROUP BY {column}",
            f"join {parent.name} and {c.name} ; keep {where.sql} ; group by {column} ; show {column} and count",
            f"SELECT COUNT(*) FROM {_joined(c)} WHERE {where.sql} GROUP BY {column}",
            f"join {parent.name} and {c.name} ; keep {where.sql} ; group by {column} ; show count")


def join_top(p, c):
    parent, column, number = c.parent, p.rng.choice(c.parent.texts), p.rng.choice(c.numbers)
    where, (word, order) = p.equals(c), p.direction()
    return (f"Of the {p.many(c)} {where.words} , {p.show().lower()} the {parent.name} {p.say(column)} of the one with the {word} {p.say(number)} ?",
            f"SELECT {column} FROM {_joined(c)} WHERE {where.sql} ORDER BY {number} {order} LIMIT 1",
            f"join {parent.name} and {c.name} ; keep {where.sql} ; order by {number} {order} limit 1 ; show {column}",
            f"SELECT {column}, {number} FROM {_joined(c)} WHERE {where.sql} ORDER BY {number} {order} LIMIT 1",
            f"join {parent.name} and {c.name} ; keep {where.sql} ; order by {number} {order} limit 1 ; show {column} and {number}")


def nested_average(p, t):
    column, number, where = p.rng.choice(t.texts), p.rng.choice(t.numbers), p.condition(t)
    word, operator = p.rng.choice([("above", ">"), ("below", "<")])
    return (f"{p.show()} the {p.say(column)} of {p.many(t)} whose {p.say(number)} is {p.say(word)} the {p.say('average')} of {p.many(t)} {where.words} ?",
            f"SELECT {column} FROM {t.name} WHERE {number} {operator} ( SELECT AVG( {number} ) FROM {t.name} WHERE {where.sql} )",
            f"inner AVG( {number} ) of {t.name} keep {where.sql} ; outer keep {number} {operator} inner ; show {column}",
            f"SELECT {column}, {number} FROM {t.name} WHERE {number} {operator} ( SELECT AVG( {number} ) FROM {t.name} WHERE {where.sql} )",
            f"inner AVG( {number} ) of {t.name} keep {where.sql} ; outer keep {number} {operator} inner ; show {column} and {number}")


def nested_intersect(p, t):
    column, first, second = p.rng.choice(t.texts), p.compares(t, ">"), p.compares(t, "<")
    return (f"Which {p.say(column)} values occur both among {p.many(t)} {first.words} and among {p.many(t)} {second.words} ?",
            f"SELECT {column} FROM {t.name} WHERE {first.sql} INTERSECT SELECT {column} FROM {t.name} WHERE {second.sql}",
            f"table {t.name} ; show {column} keep {first.sql} ; intersect ; show {column} keep {second.sql}",
            f"SELECT {column} FROM {t.name} WHERE {first.sql} AND {second.sql}",
            f"table {t.name} ; keep {first.sql} and {second.sql} ; show {column}")


def nested_except(p, t):
    column, first, second = p.rng.choice(t.texts), p.condition(t), p.compares(t)
    return (f"Which {p.say(column)} values occur among {p.many(t)} {first.words} but not among {p.many(t)} {second.words} ?",
            f"SELECT {column} FROM {t.name} WHERE {first.sql} EXCEPT SELECT {column} FROM {t.name} WHERE {second.sql}",
            f"table {t.name} ; show {column} keep {first.sql} ; except ; show {column} keep {second.sql}",
            f"SELECT {column} FROM {t.name} WHERE {first.sql} AND NOT {second.sql}",
            f"table {t.name} ; keep {first.sql} and not {second.sql} ; show {column}")


def nested_union(p, t):
    column, first, second = p.rng.choice(t.texts), p.condition(t), p.condition(t)
    return (f"Which {p.say(column)} values occur among {p.many(t)} {first.words} or among {p.many(t)} {second.words} ?",
            f"SELECT {column} FROM {t.name} WHERE {first.sql} UNION SELECT {column} FROM {t.name} WHERE {second.sql}",
            f"table {t.name} ; show {column} keep {first.sql} ; union ; show {column} keep {second.sql}",
            f"SELECT {column} FROM {t.name} WHERE {first.sql} AND {second.sql}",
            f"table {t.name} ; keep {first.sql} and {second.sql} ; show {column}")


def nested_without(p, c):
    parent, column, where = c.parent, p.rng.choice(c.parent.texts), p.condition(c)
    return (f"{p.show()} the {p.say(column)} of {p.many(parent)} without any {p.many(c)} {where.words} ?",
            f"SELECT {column} FROM {parent.name} WHERE {parent.key} NOT IN ( SELECT {parent.key} FROM {c.name} WHERE {where.sql} )",
            f"inner {parent.key} of {c.name} keep {where.sql} ; outer {parent.name} not in inner ; show {column}",
            f"SELECT {column} FROM {_joined(c)} WHERE NOT {where.sql}",
            f"join {parent.name} and {c.name} ; keep not {where.sql} ; show {column}")


def nested_count(p, c):
    parent, where = c.parent, p.condition(c)
    start = p.either(f"How many {p.many(parent)} have", f"Count the {p.many(parent)} that have")
    return (f"{start} at least one of the {p.many(c)} {where.words} ?",
            f"SELECT COUNT(*) FROM {parent.name} WHERE {parent.key} IN ( SELECT {parent.key} FROM {c.name} WHERE {where.sql} )",
            f"inner {parent.key} of {c.name} keep {where.sql} ; outer {parent.name} in inner ; count rows",
            f"SELECT COUNT(*) FROM {_joined(c)} WHERE {where.sql}",
            f"join {parent.name} and {c.name} ; keep {where.sql} ; count rows")


FORMS = {
    "simple": (simple_list, simple_count, simple_aggregate, simple_both, simple_distinct),
    "group": (group_count, group_aggregate, group_having, group_top, group_ranked, group_common),
    "join": (join_list, join_count, join_aggregate, join_parents, join_grouped, join_top),
    "nested": (nested_average, nested_intersect, nested_except, nested_union, nested_without, nested_count),
}
NEEDS_CHILD = {*FORMS["join"], nested_without, nested_count}


ASKS_WHAT_IT_SAYS = re.compile(r"SELECT (?:DISTINCT )?(\w+)\b.*WHERE \1 = '")  # "the city of museums whose city is Rome"


def _is_clear(connection: sqlite3.Connection, sql: str) -> bool:
    """True when the gold answer is not empty, not all NULL, and not decided by a tie at a LIMIT."""
    rows = connection.execute(sql).fetchall()
    if not rows or all(value in (None, 0) for value in rows[0]):
        return False
    head, limit, k = sql.rpartition(" LIMIT ")
    if not limit:
        return True
    key, _, order = head.rpartition(" ORDER BY ")[2].rpartition(" ")
    body = head.rpartition(" ORDER BY ")[0].partition(" FROM ")[2]
    keys = connection.execute(f"SELECT {key} FROM {body} ORDER BY {key} {order} LIMIT {int(k) + 1}").fetchall()
    return len(keys) > int(k) and len(set(keys)) == len(keys)


def _differs(connection: sqlite3.Connection, sql: str, other: str) -> bool:
    """Whether two queries return different sets of rows, so that a slip is really wrong on these data."""
    return set(connection.execute(sql).fetchall()) != set(connection.execute(other).fetchall())


def _split_of(db_id: str, sql: str) -> str:
    """The split that owns a gold SQL: 70 % training, 12 % dev, 18 % test, by hash, so the same for every seed."""
    share = int(hashlib.sha256(f"{db_id}\n{sql}".encode()).hexdigest(), 16) % 100
    return "train" if share < 70 else "dev" if share < 82 else "test"


def draw_questions(split: str, worlds: dict, connections: dict, seed: int, slips: float) -> list[dict]:
    """Draws SIZES[split][tier] records of each tier, forms and databases in turn, without repeated questions."""
    rng = random.Random(f"{seed}/{split}")
    records, seen = [], set()
    for tier in TIERS:
        wanted, drawn, attempt = SIZES[split][tier], 0, 0
        while drawn < wanted:
            form = FORMS[tier][attempt % len(FORMS[tier])]
            db_id = list(worlds)[(attempt // len(FORMS[tier])) % len(worlds)]
            attempt += 1
            tables = worlds[db_id]
            table = tables[-1] if form in NEEDS_CHILD else rng.choice(tables)
            plain = split == "cold" and tier != "simple"
            question, sql, trace, *slip = form(Phrasing(tables, connections[db_id], rng, plain), table)
            owner = "train" if split == "cold" else split
            if (db_id, question) in seen or (split != "unseen" and _split_of(db_id, sql) != owner):
                continue
            if ASKS_WHAT_IT_SAYS.search(sql) or not _is_clear(connections[db_id], sql):
                continue
            seen.add((db_id, question))
            drawn += 1
            record = {"id": f"{split}-{tier}-{drawn}", "db_id": db_id, "question": question, "sql": sql,
                      "difficulty": tier, "trace": trace if split == "cold" else "", "trace_sql": ""}
            if split == "cold" and slip and rng.random() < slips and _differs(connections[db_id], sql, slip[0]):
                record |= {"trace_sql": slip[0], "trace": slip[1]}
            records.append(record)
    rng.shuffle(records)
    return records


# ---------------------------------------------------------------------------------------------- entry


def load(split: str = "train", data_dir: str | Path | None = None, seed: int = 0,
         world: str = "default") -> tuple[list[dict], dict[str, Path]]:
    """Returns (records, databases) of one split; builds the databases under `data_dir` on first use.

    A record has id, db_id, question, sql, difficulty (the tier), trace ("" outside `cold`), and trace_sql, the SQL that
    the trace leads to if that is a slip, else "". Questions and databases vary with the seed.

    Raises:
        ValueError: `split` is none of SPLITS, or `world` none of WORLDS.
    """
    if world not in WORLDS:
        raise ValueError(f"there is no demo world '{world}'; choose one of {', '.join(WORLDS)}")
    if split not in SPLITS:
        raise ValueError(f"the demo world has no split '{split}'; choose one of {', '.join(SPLITS)}")
    worlds = {db_id: parse_tables(line) for db_id, line in (UNSEEN if split == "unseen" else SEEN).items()}
    root = Path(data_dir or Path(__file__).parents[1] / "demo_data") / f"seed-{seed}"
    databases = {db_id: _ensure_database(root, db_id, tables, seed) for db_id, tables in worlds.items()}
    connections = {db_id: sqlite3.connect(path) for db_id, path in databases.items()}
    try:
        return draw_questions(split, worlds, connections, seed, WORLDS[world]), databases
    finally:
        for connection in connections.values():
            connection.close()


def _ensure_database(root: Path, db_id: str, tables: list[DemoTable], seed: int) -> Path:
    path = root / db_id / f"{db_id}.sqlite"
    if not path.exists():  # built aside and renamed, so that a killed first run leaves no half database
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=root)
        build_database(Path(scratch) / "new.sqlite", tables, random.Random(f"{seed}/{db_id}"))
        os.replace(Path(scratch) / "new.sqlite", path)
        shutil.rmtree(scratch)
    return path
