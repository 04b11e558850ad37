"""Texts to count the tokens of, new at each call: English, Python code, many scripts, no spaces.

English is the prose of Python's own documentation and docstrings, code the modules of its library
that MODULES names: both are of the interpreter that runs. The rest is made here. `digest` says
whether two runs had the same. A text is a piece of these that no text before it had a part of. When
a corpus has been used up, texts are pieces from any place, and in each 250 characters two letters
of a word have changed places. So no text comes twice, and no cache of texts or pieces has seen all
of one; words come again as often as they do in prose or code.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import pathlib
import random
import re
import sysconfig
from collections.abc import Callable, Iterator

_CHUNK = 250  # characters
_WORD = r"[^\W\d_]{4,}"  # that may be changed

MODULES = (  # fmt: skip
    "argparse",
    "ast",
    "bdb",
    "cgitb",
    "codecs",
    "configparser",
    "csv",
    "dataclasses",
    "datetime",
    "difflib",
    "doctest",
    "enum",
    "fractions",
    "ftplib",
    "functools",
    "gettext",
    "heapq",
    "imaplib",
    "inspect",
    "ipaddress",
    "locale",
    "mailbox",
    "optparse",
    "pdb",
    "pickle",
    "pickletools",
    "platform",
    "plistlib",
    "pprint",
    "pydoc",
    "random",
    "shutil",
    "smtplib",
    "socket",
    "ssl",
    "statistics",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "tokenize",
    "trace",
    "traceback",
    "typing",
    "uuid",
    "weakref",
    "zipapp",
)

# The first article of the Universal Declaration of Human Rights, and other sentences as plain.
LANGUAGES = (
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft "
    "und Gewissen begabt und sollen einander im Geist der Brüderlichkeit begegnen.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués "
    "de raison et de conscience et doivent agir les uns envers les autres dans un esprit de "
    "fraternité.",
    "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni "
    "obdarzeni rozumem i sumieniem i powinni postępować wobec innych w duchu braterstwa.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana "
    "sahiptirler ve birbirlerine karşı kardeşlik zihniyeti ile hareket etmelidirler.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi. Mọi con "
    "người đều được tạo hóa ban cho lý trí và lương tâm.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены "
    "разумом и совестью и должны поступать в отношении друг друга в духе братства.",
    "Всі люди народжуються вільними і рівними у своїй гідності та правах. Вони наділені "
    "розумом і совістю і повинні діяти у відношенні один до одного в дусі братерства.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. "
    "Είναι προικισμένοι με λογική και συνείδηση.",
    "יולדו כל בני האדם בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון, לפיכך "
    "חובה עליהם לנהוג איש ברעהו ברוח של אחווה.",
    "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميراً وعليهم أن "
    "يعامل بعضهم بعضاً بروح الإخاء.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और "
    "अन्तरात्मा की देन प्राप्त है।",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে। তাঁদের বিবেক এবং বুদ্ধি আছে।",
    "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் மதிப்பிலும் உரிமைகளிலும் சமமானவர்கள்.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม",
    "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით. მათ "
    "მინიჭებული აქვთ გონება და სინდისი.",
    "Բոլոր մարդիկ ծնվում են ազատ ու հավասար իրենց արժանապատվությամբ ու իրավունքներով։ Նրանք "
    "ունեն բանականություն ու խիղճ։",
    "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 "
    "이성과 양심을 부여받았다.",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 🤖 🫠 ∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β → γ ½ ² €",
)
_SENTENCES = 24_000  # that are made of these


def _library() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path("stdlib"))


def _english() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems have it in a package of its own
        return "\n".join(_docstrings())
    return "\n".join([*(topics[name] for name in sorted(topics)), *_docstrings()])


def _docstrings() -> Iterator[str]:
    for path in sorted(_library().glob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def _code() -> str:
    paths = (_library() / f"{name}.py" for name in MODULES)
    return "".join(path.read_text("utf-8") for path in paths if path.exists())


def _scripts() -> str:
    """Sentences in each language in turn: words of it, and in each third place the beginning of
    one with the end of another. Where words are not set apart, four letters are one."""
    rng, out = random.Random(18), []
    known = []
    for language in LANGUAGES:
        words, between = language.split(" "), " "
        if len(words) < 5:
            words, between = re.findall("(?s).{1,4}", language), ""
        known.append((words, between))
    for i in range(_SENTENCES):
        words, between = known[i % len(known)]
        chosen = rng.choices(words, k=12)
        for j in range(0, len(chosen), 3):
            one, two = chosen[j], chosen[j - 1]
            chosen[j] = one[: len(one) // 2] + two[len(two) // 2 :]
        out.append(between.join(chosen))
    return "\n".join(out)


def _spaceless() -> str:
    return re.sub("[^a-z]", "", corpus("English").lower())


KINDS: dict[str, Callable[[], str]] = {
    "English": _english,
    "Python code": _code,
    "many scripts": _scripts,
    "no spaces": _spaceless,
}


@functools.cache
def corpus(kind: str) -> str:
    """All that texts of this kind are pieces of."""
    return KINDS[kind]()


def digest() -> str:
    """Of all kinds: the same where two runs count the same texts."""
    return hashlib.sha256("\0".join(map(corpus, KINDS)).encode()).hexdigest()[:12]


class Texts:
    """Texts of one kind, each of them new. The same seed gives the same ones."""

    def __init__(self, kind: str, seed: int) -> None:
        whole = corpus(kind)
        self._chunks = [whole[i : i + _CHUNK] for i in range(0, len(whole) - _CHUNK, _CHUNK)]
        self._words: list[list[tuple[int, int]] | None] = [None] * len(self._chunks)
        self._rng = random.Random(f"{kind} {seed}")
        start = self._rng.randrange(len(whole))
        self._unused = whole[start:] + whole[:start]
        self._used = 0
        self._given: set[int] = set()

    def _changed(self, number: int) -> str:
        """A chunk in which two letters of a word have changed places."""
        chunk, words = self._chunks[number], self._words[number]
        if words is None:
            found = re.finditer(_WORD, chunk)
            words = self._words[number] = [word.span() for word in found] or [(0, len(chunk))]
        start, end = self._rng.choice(words)
        i, j = (start + int(self._rng.random() * (end - start)) for _ in range(2))
        i, j = min(i, j), max(i, j)
        if i == j:
            return chunk
        return f"{chunk[:i]}{chunk[j]}{chunk[i + 1 : j]}{chunk[i]}{chunk[j + 1 :]}"

    def _piece(self, size: int) -> str:
        start, end = self._used, self._used + size
        if end <= len(self._unused):
            self._used = end
            return self._unused[start:end]
        first = self._rng.randrange(len(self._chunks))
        skipped = self._rng.randrange(_CHUNK // 2)
        count = (size + skipped) // _CHUNK + 1
        numbers = (number % len(self._chunks) for number in range(first, first + count))
        return "".join(map(self._changed, numbers))[skipped : skipped + size]

    def new(self, size: int) -> str:
        """A text of so many characters that was not given before. Of one character, there are
        not as many as that: those come again."""
        while True:
            text = self._piece(size)
            if size == 1 or hash(text) not in self._given:
                self._given.add(hash(text))
                return text


def fresh(text: str) -> str:
    """The same in an object of its own: a str keeps the UTF-8 that the first library to count it
    has asked for, and the next one would find it there."""
    return text.encode().decode()
