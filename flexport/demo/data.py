"""The demo's synthetic records: owns every word of them, and makes the job from seeds alone.

A record is a short made-up order, delivery or booking note. It holds a person, a city and up to
five more fields in varied order and wording, among distractors of the same kinds (another person,
another city, a fee, a reference number). The task is to copy the fields into one canonical line:

    Order 5121. Tilda Morsen wants three copper lamps, please send to Garnholm. Agent: Reko Bassley.
    =>
    name: Tilda Morsen; city: Garnholm; item: copper lamp; qty: 3

Every name and city is put together from syllables. The pools are cut in two: held-out names never
occur in training records and always occur in demo records, so the two sets cannot share a record
and copying, not memory, is what the model has to learn. Pure Python; the same seed gives the same
records everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "DEMO_SEED",
    "PROMPT_END",
    "TRAIN_SEED",
    "Record",
    "Subset",
    "held_out_names",
    "make_records",
    "training_names",
]

Subset = Literal["train", "demo"]

TRAIN_SEED = "flexport demo: training records, 1"
DEMO_SEED = "flexport demo: unseen records, 1"

PROMPT_END = "\n=>\n"
"""What stands between a record and its answer."""

HELD_OUT_SHARE = 0.2
"""Share of each pool of names and cities that training never sees."""

FIELDS = ("name", "city", "item", "qty", "date", "price", "code")
"""Order of the fields in an answer; a field that the record lacks is left out."""

MAX_QUANTITY = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One note as a prompt, and the line that a perfect reader answers with."""

    prompt: str
    answer: str


def make_records(seed: str, *, subset: Subset) -> Iterator[Record]:
    """An endless stream of records; the same seed and subset give the same stream."""
    rng = random.Random(seed)
    while True:
        yield _Writer(rng, subset).record()


# --- names ---------------------------------------------------------------------------------------

_ONSETS = "b br d dr f fl g gr h j k kl l m n p r s st t tr v w z".split()
_VOWELS = "a e i o u".split()
_CODAS = "l m n r s rn ld nd st ck".split()
_FIRST_ENDS = "a o el en in ia us ie ar ette".split()
_LAST_ENDS = "sen man ova ski ley ton ini ers well dal".split()
_CITY_ENDS = "holm ford ville burg haven mouth stad wick by port".split()

# Syllables put together blindly make rude words too; records that people look at do without.
_RUDE = "dick dildo fuck homo klan kock piss prick pus semen suck".split()


def _pool(name: str, ends: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All words stem + ending in a fixed random order, cut into (training, held-out) words."""
    stems = [onset + vowel + coda for onset in _ONSETS for vowel in _VOWELS for coda in _CODAS]
    words = [(stem + end).capitalize() for stem in stems for end in ends]
    random.Random(f"flexport demo: pool {name}").shuffle(words)
    cut = round(len(words) * (1 - HELD_OUT_SHARE))
    return tuple(words[:cut]), tuple(words[cut:])


_FIRST_TRAIN, _FIRST_HELD_OUT = _pool("first", _FIRST_ENDS)
_LAST_TRAIN, _LAST_HELD_OUT = _pool("last", _LAST_ENDS)
_CITY_TRAIN, _CITY_HELD_OUT = _pool("city", _CITY_ENDS)


def training_names() -> frozenset[str]:
    """First and last names that training records may use."""
    return frozenset(_FIRST_TRAIN) | frozenset(_LAST_TRAIN)


def held_out_names() -> frozenset[str]:
    """First and last names that only demo records use."""
    return frozenset(_FIRST_HELD_OUT) | frozenset(_LAST_HELD_OUT)


# --- values --------------------------------------------------------------------------------------

_ADJECTIVES = (
    "copper wooden glass silver paper cotton leather ceramic plastic steel woollen bamboo "
    "red blue green white black yellow grey brown large small round folding "
    "heavy light antique striped plain painted"
).split()
_NOUNS = (
    "lamp chair table bowl basket kettle blanket mirror clock vase bottle plate spoon "
    "pillow curtain ladder bucket hammer notebook pencil candle teapot cushion carpet "
    "stool drawer frame helmet lantern kite whistle puzzle jacket scarf hat tent "
    "backpack saddle ribbon trumpet"
).split()
_MONTHS = (
    "January February March April May June July August September October November December"
).split()
_NUMBER_WORDS = {
    1: "one",
    2: "two",
    3: "three",
    4: "four",
    5: "five",
    6: "six",
    7: "seven",
    8: "eight",
    9: "nine",
    10: "ten",
    12: "a dozen",
}
_OPENINGS = (
    "Order {ref}.",
    "Note {ref}.",
    "Booking {ref}.",
    "Delivery {ref}.",
    "Ticket {ref}:",
    "Hello,",
    "New note.",
    "Message:",
    "Memo -",
    "Phone call.",
    "From the desk:",
    "Re: {ref}.",
)

# Wordings of one field. {v} is the value as it is written in this record.
_FORM_LABELS = {
    "name": ("Client", "Customer", "Recipient", "Ordered by", "Contact", "Buyer"),
    "city": ("City", "Town", "Destination", "Ship to", "Deliver to", "Place"),
    "item": ("Item", "Goods", "Product", "Article"),
    "qty": ("Qty", "Count", "Number", "Units", "How many"),
    "date": ("Due", "Date", "Needed by", "Deliver on", "When"),
    "price": ("Price", "Unit price", "Cost", "Price each"),
    "code": ("Tracking", "Code", "Parcel code", "Tracking code"),
}
_FORM_DISTRACTORS = (
    "Agent: {name}",
    "Taken by: {name}",
    "Seller: {name}",
    "Warehouse: {city}",
    "Sent from: {city}",
    "Billing office: {city}",
    "Ref: {ref}",
    "Phone: {code}",
    "Account: {code}",
    "Placed on: {date}",
    "Last order: {date}",
    "Fee: {price}",
    "Shipping: {price}",
    "Instead of: {item}",
)
_ORDERS = (
    "the client {name} wants {goods}.",
    "please prepare {goods} for {name}.",
    "we owe {name} {goods}.",
    "{goods} for {name}.",
    "a customer called {name} asked for {goods}.",
    "can you send {goods} to {name}?",
    "this is {name}, I would like {goods}.",
    "my name is {name} and I need {goods}.",
    "{name} here, I want to order {goods}.",
    "{name} has booked {goods}.",
)
_NAME_SENTENCES = (
    "this is a note for {name}.",
    "the client is {name}.",
    "my name is {name}.",
    "{name} here.",
    "{name} called.",
    "we heard from {name}.",
)
_CITY_SENTENCES = (
    "please send to {city}.",
    "it goes to {city}.",
    "deliver in {city}.",
    "ship everything to {city}.",
    "the address is in {city}.",
    "I live in {city}.",
    "the truck should drive to {city}.",
)
_ITEM_SENTENCES = (
    "it is about {goods}.",
    "we need {goods}.",
    "the list says {goods}.",
    "pack {goods}.",
)
_DATE_SENTENCES = (
    "it must arrive on {date}.",
    "needed by {date}.",
    "deliver on {date}.",
    "the due date is {date}.",
    "we expect it on {date}.",
)
_PRICE_SENTENCES = (
    "the price is {price} each.",
    "we agreed on {price} each.",
    "one costs {price}.",
    "the unit price is {price}.",
)
_CODE_SENTENCES = (
    "the tracking code is {code}.",
    "use code {code}.",
    "the parcel has code {code}.",
    "track it as {code}.",
)
_PROSE_DISTRACTORS = (
    "the call was taken by {name}.",
    "{name} from sales wrote this down.",
    "do not confuse with {name}.",
    "the agent was {name}.",
    "the parcel leaves from {city}.",
    "our warehouse is in {city}.",
    "not to the old address in {city}.",
    "the last order was on {date}.",
    "this was written on {date}.",
    "the shipping fee is {price}.",
    "last year it was {price}.",
    "the reference is {ref}.",
    "call back at {code}.",
    "the phone number is {code}.",
    "pay from account {code}.",
    "the {item} was sold out.",
    "no more {item}, thanks.",
)
_FILLERS = (
    "thank you.",
    "thanks a lot!",
    "no hurry.",
    "please confirm.",
    "ring twice.",
    "leave it at the door.",
    "pack it well.",
    "it is a present.",
)


class _Writer:
    """Writes one record: draws its fields, then their wording, order and distractors."""

    def __init__(self, rng: random.Random, subset: Subset) -> None:
        self._rng = rng
        self._subset = subset
        self._initials: set[str] = set()

    def record(self) -> Record:
        """Draw one record."""
        rng = self._rng
        fields = {"name": self._name(), "city": self._city()}
        if rng.random() < 0.85:
            fields["item"] = self._item()
            fields["qty"] = str(self._quantity())
        if rng.random() < 0.4:
            fields["date"] = self._date()
        if rng.random() < 0.35:
            fields["price"] = self._price()
        if rng.random() < 0.4:
            fields["code"] = self._code()
        note = self._form(fields) if rng.random() < 0.4 else self._prose(fields)
        answer = "; ".join(f"{key}: {fields[key]}" for key in FIELDS if key in fields)
        return Record(prompt=note + PROMPT_END, answer=answer)

    # Values in canonical form.

    def _fresh(self, words: Sequence[str]) -> str:
        """A word whose first two letters no earlier name or city of this record has.

        Two names that begin alike would have to be told apart in mid-word, which makes the task
        about spelling rather than about reading.
        """
        while True:
            word = self._rng.choice(words)
            if self._subset == "demo" and any(part in word.lower() for part in _RUDE):
                continue
            if word[:2] not in self._initials:
                self._initials.add(word[:2])
                return word

    def _name(self) -> str:
        demo = self._subset == "demo"
        first = self._fresh(_FIRST_HELD_OUT if demo else _FIRST_TRAIN)
        if self._rng.random() < 0.2:
            return first
        return f"{first} {self._fresh(_LAST_HELD_OUT if demo else _LAST_TRAIN)}"

    def _city(self) -> str:
        unseen = self._subset == "demo" and self._rng.random() < 0.5
        return self._fresh(_CITY_HELD_OUT if unseen else _CITY_TRAIN)

    def _item(self) -> str:
        return f"{self._rng.choice(_ADJECTIVES)} {self._rng.choice(_NOUNS)}"

    def _quantity(self) -> int:
        small = self._rng.random() < 0.7
        return self._rng.randrange(1, 13 if small else MAX_QUANTITY + 1)

    def _date(self) -> str:
        return f"{self._rng.randrange(1, 29)} {self._rng.choice(_MONTHS)[:3]}"

    def _price(self) -> str:
        return f"{self._rng.randrange(1, 200)}.{self._rng.choice(('00', '50', '25', '99', '75'))}"

    def _code(self) -> str:
        """Six to ten digits.

        The same few digits stand all over a record, so that copying a code takes exact attention.
        """
        return str(self._rng.randrange(10**5, 10 ** self._rng.randrange(6, 11)))

    # Values as a record may write them.

    def _written_date(self, date: str) -> str:
        day, month = date.split()
        if self._rng.random() < 0.6:
            month = next(full for full in _MONTHS if full.startswith(month))
        return f"{day} {month}" if self._rng.random() < 0.6 else f"{month} {day}"

    def _written_price(self, price: str) -> str:
        return self._rng.choice((f"$ {price}", f"{price} euros", f"EUR {price}"))

    def _written_quantity(self, quantity: str) -> str:
        if self._rng.random() < 0.4:
            return _NUMBER_WORDS.get(int(quantity), quantity)
        return quantity

    def _goods(self, fields: dict[str, str]) -> str:
        plural = "" if fields["qty"] == "1" else "s"
        return f"{self._written_quantity(fields['qty'])} {fields['item']}{plural}"

    def _distractor_values(self) -> dict[str, str]:
        return {
            "name": self._name(),
            "city": self._city(),
            "item": self._item(),
            "date": self._written_date(self._date()),
            "price": self._written_price(self._price()),
            "code": self._code(),
            "ref": str(self._rng.randrange(1000, 10000)),
        }

    def _opening(self) -> str:
        return self._rng.choice(_OPENINGS).format(ref=self._rng.randrange(1000, 10000))

    def _num_distractors(self) -> int:
        return self._rng.choice((0, 0, 1, 1, 2, 3))

    # Two styles of writing.

    def _form(self, fields: dict[str, str]) -> str:
        """Labelled values in any order."""
        rng = self._rng
        written = dict(fields)
        if "qty" in fields:
            written["qty"] = self._written_quantity(fields["qty"])
        if "date" in fields:
            written["date"] = self._written_date(fields["date"])
        if "price" in fields:
            written["price"] = self._written_price(fields["price"])
        lines = [f"{rng.choice(_FORM_LABELS[key])}: {value}" for key, value in written.items()]
        for wording in rng.sample(_FORM_DISTRACTORS, self._num_distractors()):
            lines.append(wording.format(**self._distractor_values()))
        rng.shuffle(lines)
        body = rng.choice((" | ", "\n", ", ", "; ")).join(lines)
        return f"{self._opening()} {body}" if rng.random() < 0.5 else body

    def _prose(self, fields: dict[str, str]) -> str:
        """Sentences in any order."""
        rng = self._rng
        wordings: list[str] = []
        values = {"name": fields["name"], "city": fields["city"]}
        if "item" not in fields:
            wordings.append(rng.choice(_NAME_SENTENCES))
        else:
            values["goods"] = self._goods(fields)
            if rng.random() < 0.7:
                wordings.append(rng.choice(_ORDERS))
            else:
                wordings += [rng.choice(_NAME_SENTENCES), rng.choice(_ITEM_SENTENCES)]
        wordings.append(rng.choice(_CITY_SENTENCES))
        if "date" in fields:
            values["date"] = self._written_date(fields["date"])
            wordings.append(rng.choice(_DATE_SENTENCES))
        if "price" in fields:
            values["price"] = self._written_price(fields["price"])
            wordings.append(rng.choice(_PRICE_SENTENCES))
        if "code" in fields:
            values["code"] = fields["code"]
            wordings.append(rng.choice(_CODE_SENTENCES))
        sentences = [wording.format(**values) for wording in wordings]
        for wording in rng.sample(_PROSE_DISTRACTORS, self._num_distractors()):
            sentences.append(wording.format(**self._distractor_values()))
        if rng.random() < 0.3:
            sentences.append(rng.choice(_FILLERS))
        rng.shuffle(sentences)
        # An opening always comes first, so that a name never begins the text: there it would be
        # cut into other tokens than after a space.
        return " ".join([self._opening(), *(text[0].upper() + text[1:] for text in sentences)])
