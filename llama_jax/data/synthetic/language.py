"""Minimal pairs of sentences by rule, and facts that are told in one direction.

Each pair differs in one word, or in the order of two. The rules are those of BLiMP (Warstadt et al.
2020) and SLING (Song et al. 2022), without their data. The Chinese classifiers are ones that a noun
has or cannot have: pairs with the general one, which most nouns can have, are what SLING found
wrong in an earlier set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from llama_jax.data import splits
from llama_jax.data.synthetic.made import Made, one, shuffled, some, word, words

Pair = tuple[str, str]
"""Right, wrong."""

_PEOPLE = {
    **{
        name: f'{name}s'
        for name in words('teacher doctor driver student baker farmer singer lawyer')
    },
    **{name: f'{name}s' for name in words('waiter sailor painter nurse guest neighbor writer boy')},
    **{'woman': 'women', 'man': 'men', 'child': 'children', 'actress': 'actresses'},
}
_THINGS = {
    **{name: f'{name}s' for name in words('book table window picture letter chair bottle road')},
    **{name: f'{name}s' for name in words('river house garden bridge lamp pencil basket mirror')},
    **{'box': 'boxes', 'knife': 'knives', 'shelf': 'shelves', 'city': 'cities'},
}
_VERBS = {
    **{name: f'{name}s' for name in words('walk laugh sleep wait sing work listen talk')},
    **{name: f'{name}s' for name in words('run swim complain smile travel dance')},
}
_TRANSITIVE = words('admire blame trust praise watch describe')
_ADJECTIVES = words('old new small red heavy famous quiet broken green strange')
_PARTICIPLES = {
    **{'eaten': 'ate', 'written': 'wrote', 'taken': 'took', 'seen': 'saw', 'given': 'gave'},
    **{'broken': 'broke', 'worn': 'wore', 'chosen': 'chose', 'drawn': 'drew', 'stolen': 'stole'},
}
_GENDER = {
    **dict.fromkeys(words('Mary Anna Laura Susan Helen Julia Emma Nora Alice Clara'), 'herself'),
    **dict.fromkeys(words('Peter John Paul Mark Thomas David Henry Simon Frank Oscar'), 'himself'),
}


def _numbers(rng: np.random.Generator, nouns: dict[str, str]) -> tuple[str, int]:
    """A noun in singular (0) or plural (1)."""
    singular = one(rng, list(nouns))
    number = int(rng.integers(2))
    return (singular, nouns[singular])[number], number


def _subject_verb(rng: np.random.Generator) -> Pair:
    """The verb agrees with its subject, not with the noun beside it."""
    subject, number = _numbers(rng, _PEOPLE)
    near = one(rng, list(_THINGS))
    near = near if number else _THINGS[near]  # of the other number
    verb = one(rng, list(_VERBS))
    forms = (_VERBS[verb], verb)
    place = one(rng, ['near', 'behind', 'beside', 'with'])
    adjective = one(rng, _ADJECTIVES)
    begin = f'The {subject} {place} the {adjective} {near}'
    return f'{begin} {forms[number]}.', f'{begin} {forms[1 - number]}.'


def _determiner_noun(rng: np.random.Generator) -> Pair:
    noun = one(rng, list(_THINGS))
    number = int(rng.integers(2))
    forms = (noun, _THINGS[noun])
    determiner = one(rng, (['this', 'that'], ['these', 'those'])[number])
    person, _ = _numbers(rng, _PEOPLE)
    begin = f'The {person} found {determiner} {one(rng, _ADJECTIVES)}'
    return f'{begin} {forms[number]}.', f'{begin} {forms[1 - number]}.'


def _reflexive(rng: np.random.Generator) -> Pair:
    name, pronoun = list(_GENDER.items())[int(rng.integers(len(_GENDER)))]
    wrong = 'himself' if pronoun == 'herself' else 'herself'
    verb = one(rng, _TRANSITIVE)
    person, _ = _numbers(rng, _PEOPLE)
    middle = f'who saw the {person} can {verb}' if rng.integers(2) else f'will {verb}'
    return f'{name} {middle} {pronoun}.', f'{name} {middle} {wrong}.'


def _participle(rng: np.random.Generator) -> Pair:
    right, wrong = list(_PARTICIPLES.items())[int(rng.integers(len(_PARTICIPLES)))]
    subject, number = _numbers(rng, _PEOPLE)
    thing, _ = _numbers(rng, _THINGS)
    begin = f'The {subject} {("has", "have")[number]}'
    return f'{begin} {right} the {thing}.', f'{begin} {wrong} the {thing}.'


def _polarity(rng: np.random.Generator) -> Pair:
    """'ever' stands under a negation."""
    verb = one(rng, _TRANSITIVE)
    person, number = _numbers(rng, _PEOPLE)
    has = ('has', 'have')[number]
    rest = f'{person} {has} ever {verb.removesuffix("e")}ed the {one(rng, list(_THINGS))}.'
    return f'No {rest}', f'{one(rng, ["The", "Some"])} {rest}'


_ZH_SUBJECTS = ['我', '他', '她', '老师', '弟弟', '妈妈', '爸爸', '姐姐', '朋友', '医生']
_ZH_PLURAL = ['我们', '他们', '她们', '老师们', '学生们', '孩子们', '朋友们', '同事们']
_ZH_NUMBERS = list('一两三四五六七八九十')
_ZH_PLACES = ['公园里', '学校里', '城里', '家里', '商店里', '路边', '这里', '那里', '河边', '车站']
_ZH_CLASSIFIERS = {
    **dict.fromkeys(['河', '鱼', '裤子', '蛇', '毛巾', '围巾'], '条'),
    **dict.fromkeys(['纸', '桌子', '照片', '地图', '床', '邮票'], '张'),
    **dict.fromkeys(['书', '杂志', '小说', '词典'], '本'),
    **dict.fromkeys(['汽车', '自行车', '卡车', '出租车'], '辆'),
    **dict.fromkeys(['猫', '鸟', '老鼠', '兔子', '鸡'], '只'),
    **dict.fromkeys(['刀', '伞', '钥匙', '剪刀'], '把'),
    **dict.fromkeys(['衬衫', '毛衣', '外套', '大衣'], '件'),
    **dict.fromkeys(['山', '塔', '城市', '岛'], '座'),
    **dict.fromkeys(['树', '白菜', '松树'], '棵'),
    **dict.fromkeys(['飞机', '钢琴'], '架'),
    **dict.fromkeys(['歌', '诗'], '首'),
    **dict.fromkeys(['公司', '饭店', '银行', '医院'], '家'),
}
_ZH_ALSO = {
    **{'蛇': '只', '鱼': '只', '山': '条', '裤子': '件', '围巾': '件', '诗': '本', '地图': '本'},
    **{'邮票': '本把', '纸': '本条把', '医院': '座', '饭店': '座', '银行': '座', '公司': '座'},
    **{'照片': '把本', '钥匙': '条', '白菜': '把'},
}
"""What some say as well, which is no error; 把 is a handful of what is small."""
_ZH_DONE = {
    **{'吃': ['苹果', '饺子', '西瓜', '面条'], '去': ['北京', '上海', '法国', '海边']},
    **{'学': ['法语', '钢琴', '画画', '游泳'], '坐': ['飞机', '火车', '轮船', '地铁']},
    **{'喝': ['啤酒', '绿茶', '咖啡', '牛奶'], '骑': ['马', '骆驼', '自行车', '摩托车']},
    **{
        '看': ['京剧', '足球赛', '这部电影', '那本书'],
        '听': ['这首歌', '那个故事', '音乐会', '相声'],
    },
}
_ZH_ADJECTIVES = ['高', '快', '聪明', '年轻', '忙', '努力', '热情', '有名', '细心', '幽默']
_ZH_TIMES = ['昨天', '前天', '去年', '上个月', '上个星期']
_ZH_FUTURE = ['明天', '后天', '明年', '下个月', '下个星期']


def _zh_classifier(rng: np.random.Generator) -> Pair:
    noun = one(rng, list(_ZH_CLASSIFIERS))
    right = _ZH_CLASSIFIERS[noun]
    others = sorted({*_ZH_CLASSIFIERS.values()} - {right, *_ZH_ALSO.get(noun, '')})
    begin = f'{one(rng, _ZH_SUBJECTS)}在{one(rng, _ZH_PLACES)}看见了{one(rng, _ZH_NUMBERS)}'
    return f'{begin}{right}{noun}。', f'{begin}{one(rng, others)}{noun}。'


def _zh_done(rng: np.random.Generator) -> tuple[str, str]:
    verb = one(rng, list(_ZH_DONE))
    return verb, one(rng, _ZH_DONE[verb])


def _zh_negation(rng: np.random.Generator) -> Pair:
    """Experience (过) is denied by 没."""
    verb, what = _zh_done(rng)
    begin = one(rng, _ZH_SUBJECTS + _ZH_PLURAL) + one(rng, ['', '从来', '以前', '还'])
    return f'{begin}没{verb}过{what}。', f'{begin}不{verb}过{what}。'


def _zh_comparison(rng: np.random.Generator) -> Pair:
    a, b = some(rng, _ZH_SUBJECTS, 2)
    rest = one(rng, _ZH_ADJECTIVES) + '。'
    return f'{a}比{b}更{rest}', f'{a}比{b}很{rest}'


def _zh_adverbs(rng: np.random.Generator) -> Pair:
    verb, what = _zh_done(rng)
    begin, rest = one(rng, _ZH_PLURAL), f'{verb}过{what}。'
    return f'{begin}也都{rest}', f'{begin}都也{rest}'


def _zh_question(rng: np.random.Generator) -> Pair:
    """A question with V不V takes no 吗."""
    verb, what = _zh_done(rng)
    time = one(rng, ['', *_ZH_FUTURE])
    begin = f'{one(rng, _ZH_SUBJECTS + _ZH_PLURAL)}{time}{verb}不{verb}{what}'
    return f'{begin}呢？', f'{begin}吗？'


def _zh_time(rng: np.random.Generator) -> Pair:
    """What has happened (了) was before."""
    verb, what = _zh_done(rng)
    subject, which = one(rng, _ZH_SUBJECTS + _ZH_PLURAL), int(rng.integers(len(_ZH_TIMES)))
    rest = f'{verb}了{what}。'
    return f'{subject}{_ZH_TIMES[which]}{rest}', f'{subject}{_ZH_FUTURE[which]}{rest}'


Rule = Callable[[np.random.Generator], Pair]
ENGLISH: tuple[Rule, ...] = (
    *(_subject_verb, _determiner_noun, _reflexive, _participle, _polarity),
)
CHINESE: tuple[Rule, ...] = (
    *(_zh_classifier, _zh_negation, _zh_comparison, _zh_adverbs, _zh_question, _zh_time),
)


def _pairs_of(rules: tuple[Rule, ...], rng: np.random.Generator) -> Made:
    right, wrong = rules[int(rng.integers(len(rules)))](rng)
    return Made(key=right, prompt='', answer=right, choices=shuffled(rng, [right, wrong]))


def minimal_pairs_en(rng: np.random.Generator) -> Made:
    """Which of two English sentences is right."""
    return _pairs_of(ENGLISH, rng)


def minimal_pairs_zh(rng: np.random.Generator) -> Made:
    """Which of two Chinese sentences is right."""
    return _pairs_of(CHINESE, rng)


FACTS = 400
"""Few, so that small models know them: half a million tokens tell each some thirty times."""
_ROLES = words('composer author founder mayor inventor painter director owner editor builder')


def _facts() -> dict[str, list[tuple[str, str]]]:
    """By split: people, and what they alone are. A half is told both ways round; of the others the
    test asks, and validation a few."""
    rng = np.random.default_rng(FACTS)
    people = list(dict.fromkeys(f'{word(rng, 2)} {word(rng, 2)}' for _ in range(FACTS)))
    known: dict[str, str] = {}
    for person in people:
        known.setdefault(f'the {one(rng, _ROLES)} of {word(rng, 3)}', person)
    of_split: dict[str, list[tuple[str, str]]] = {name: [] for name in splits.NAMES}
    for description, person in known.items():
        x = splits.position(person)
        split = 'test' if x < 0.45 else 'validation' if x < 0.5 else 'train'
        of_split[split].append((person, description))
    return of_split


def _asked(rng: np.random.Generator, key: str, prompt: str, answer: str, others: list[str]) -> Made:
    """A fact to be completed, among four of the same kind."""
    wrong = [other for other in some(rng, others, 4) if other != answer][:3]
    choices = shuffled(rng, [f' {choice}' for choice in (answer, *wrong)])
    return Made(key, f'{prompt} is', f' {answer}', choices, '.\n')


def told() -> Iterator[tuple[str, Made]]:
    """What A is, of whom it was told that A is B: the control of `reversal`, about the same people.
    What is asked is in the training text of `reversal`."""
    rng = np.random.default_rng(FACTS + 1)
    for split, facts in _facts().items():
        descriptions = [description for _, description in facts]
        for person, description in facts:
            yield split, _asked(rng, f'forward {person}', person, description, descriptions)


def reversal() -> Iterator[tuple[str, Made]]:
    """Who B is, of whom it was only told that A is B (Berglund et al. 2023; 2309.12288).

    Training tells every fact in this direction, and half of them in the other one too, so that both
    are known as forms; the others are asked for.
    """
    rng = np.random.default_rng(FACTS + 2)
    forward = told()  # person by person, in the same order
    for split, facts in _facts().items():
        people = [person for person, _ in facts]
        for person, description in facts:
            yield 'train', next(forward)[1]._replace(choices=())
            yield split, _asked(rng, f'reverse {person}', f'T{description[1:]}', person, people)
