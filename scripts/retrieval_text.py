#!/usr/bin/env python3
"""Documents in which facts are told and come up again thousands of tokens later: practice for what a scorer should keep.

    python3 scripts/retrieval_text.py OUT --text FOLDER [--documents 48] [--length 72000] [--farthest 30000] [--pending 16] [--seed 1]

Paragraphs of FOLDER's .txt files (scripts/training_text.py makes them) with facts between them: a subject and a value that nothing else
predicts. Each fact is told once and comes up again one to three times (fewer where the document ends), 2,000 to `farthest` characters (500 to 7,500
tokens) later in the same words, so that the values can be predicted from the earlier place alone. At most `pending` facts wait at a time. The wording, the subjects and the values differ from those of `sparsek
needles` (no pass keys, no magic numbers), which measures. The same arguments give the same bytes.
"""
import argparse
import pathlib
import random
import string

NEAREST = 2_000  # characters between telling and asking

PLACES = ("north gate", "boiler room", "archive", "tea house", "third platform", "observatory", "map room", "lower dock", "green house",
          "mill", "printing shop", "east tower", "stable", "reading hall", "pump station", "chapel", "workshop", "lighthouse", "cellar",
          "customs office", "assembly hall", "weather station", "ferry", "quarry", "orchard")
PEOPLE = ("Adele", "Bruno", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hakim", "Ingrid", "Jonas", "Keiko", "Leon", "Miriam", "Nadia",
          "Oskar", "Priya", "Quentin", "Rosa", "Stefan", "Tomoko", "Ulrich", "Vera", "Wanda", "Yusuf", "Zofia")
THINGS = ("parcel", "locker", "bicycle", "invoice", "ticket", "engine", "sample", "crate", "manuscript", "radio", "telescope", "violin",
          "passport", "lantern", "ledger", "barometer", "canoe", "typewriter", "camera", "compass")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "grey", "brown", "silver", "purple")
WORDS = ("anchor", "basket", "candle", "desert", "ember", "falcon", "garnet", "harbor", "island", "jungle", "kettle", "ladder", "meadow",
         "needle", "orange", "pepper", "quartz", "ribbon", "saddle", "timber", "umbrella", "velvet", "walnut", "yonder", "zephyr")


def digits(rng):
    return "".join(rng.choice(string.digits) for _ in range(rng.randint(4, 8)))


def words(rng):
    return " ".join(rng.sample(WORDS, 2))


def identifier(rng):
    return "".join(rng.choice(string.ascii_uppercase) for _ in range(2)) + "-" + digits(rng)


# (sentence, value): {value} comes behind the words that say which one it is, so that a reader can complete it.
KINDS = [
    ("The door code of the {place} is {value}.", digits),
    ("{person}'s {thing} has the serial number {value}.", identifier),
    ("The telephone extension of the {place} is {value}.", digits),
    ("For the {colour} {thing} the inventory lists {value}.", identifier),
    ("The password that {person} chose for the {thing} was {value}.", words),
    ("The {colour} {thing} belongs to room {value}.", digits),
    ("setting {thing}.{colour}.{place_word} = {value}", digits),
    ("The watchword at the {place} is {value}.", words),
    ("{person} paid for the {thing} with cheque {value}.", digits),
    ("In the register, the {thing} of {person} is entered as {value}.", identifier),
    ("Note the combination of the safe in the {place}: {value}.", digits),
    ("{person} was born in house number {value}.", digits),
    ("The lottery ticket of {person} bears {value}. Keep it in mind: {value}.", digits),
    ("It was agreed that the signal from the {place} would be {value}.", words),
    ("A label on the {colour} {thing} reads {value}.", identifier),
    ("The code name of {person} is {value}.", words),
    ("What {person} wrote on the {thing} was {value}, nothing else.", digits),
    ("The member number of {person} is {value}; it is needed later.", digits),
    ("One should know that the {colour} {thing} weighs {value} grams.", digits),
    ("To open the {place}, say {value}.", words),
    ("key for {person}/{thing}: {value}", digits),
    ("The last entry under {colour} {thing} is {value}.", digits),
]


def fact(rng):
    sentence, value = rng.choice(KINDS)
    place = rng.choice(PLACES)
    return sentence.format(place=place, place_word=place.replace(" ", "_"), person=rng.choice(PEOPLE), thing=rng.choice(THINGS),
                           colour=rng.choice(COLOURS), value="{value}"), value(rng)


def document(paragraphs, rng, length, farthest, most_pending):
    parts, size, pending, subjects = [], 0, [], set()
    at = rng.randrange(len(paragraphs))

    def write(text):
        nonlocal size
        parts.append(text)
        size += len(text) + 2

    while size < length:
        write(paragraphs[at % len(paragraphs)])
        at += 1
        for entry in [entry for entry in pending if entry["due"] <= size]:
            write(entry["text"])
            entry["times"] -= 1
            entry["due"] = size + rng.randint(NEAREST, farthest)
        pending = [entry for entry in pending if entry["times"] > 0]
        if size < length - farthest and len(pending) < most_pending and rng.random() < 0.5:  # later ones might never be asked
            subject, value = fact(rng)
            if subject not in subjects:
                subjects.add(subject)
                text = subject.format(value=value)
                write(text)
                pending.append({"text": text, "times": rng.randint(1, 3), "due": size + rng.randint(NEAREST, farthest)})
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--text", type=pathlib.Path, required=True, help="folder whose .txt files give the paragraphs")
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--length", type=int, default=72_000, help="characters of a document (72,000: about 18K tokens)")
    parser.add_argument("--farthest", type=int, default=30_000, help="most characters between telling and asking (30,000: 7.5K tokens)")
    parser.add_argument("--pending", type=int, default=16, help="most facts that wait to come up again")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.farthest < NEAREST or arguments.length <= arguments.farthest or arguments.documents < 1 or arguments.pending < 1:
        parser.error(f"expected --farthest of {NEAREST} or more, a longer --length, and at least 1 document and 1 pending fact")
    paragraphs = []
    for path in sorted(arguments.text.rglob("*.txt")):
        if arguments.out.resolve() in path.resolve().parents:
            continue  # its own, of a run before
        paragraphs += [p for p in path.read_text(encoding="utf-8", errors="replace").split("\n\n") if 200 <= len(p) <= 2000]
    if not paragraphs:
        parser.error(f"{arguments.text}: expected .txt files with paragraphs of 200 to 2,000 characters, found none")
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = [arguments.out / f"retrieval-{number:04}.txt" for number in range(arguments.documents)]
    for path in sorted(set(arguments.out.glob("retrieval-*.txt")) - set(paths)):
        parser.error(f"{path}: expected no documents of another run; remove them")
    for number, path in enumerate(paths):
        text = document(paragraphs, random.Random(f"{arguments.seed}/{number}"), arguments.length, arguments.farthest, arguments.pending)
        path.write_text(text, encoding="utf-8")
    print(f"{arguments.out}: {arguments.documents} documents of about {arguments.length // 1000} kB")


if __name__ == "__main__":
    main()
