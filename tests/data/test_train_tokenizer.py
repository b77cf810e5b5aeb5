"""Vocabularies learnt from text, of any size and kind, in a process that a signal ends."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from llama_jax.data import train_tokenizer
from llama_jax.data.train_tokenizer import SMALLEST, train
from llama_jax.errors import UserError
from llama_jax.text import tokenizer as tokenizer_lib
from tests.data.corpus import CHINESE


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_training_is_reproducible_and_exact_in_size(modules, kind):
    texts = [(modules / name).read_text('utf-8') for name in ('json.py', 'shlex.py', 'heapq.py')]
    first, second = (train(texts, vocab=700, kind=kind) for _ in range(2))
    assert first.digest == second.digest
    assert first.vocab_size == 700
    for text in texts:
        ids = first.encode(text)
        assert first.decode(ids) == text
        assert first.byte_lengths[ids].sum() == len(text.encode())


def test_training_on_chinese_learns_characters_within_a_small_vocabulary():
    tokenizer = train(CHINESE, vocab=512, kind='bpe')
    ids = tokenizer.encode(CHINESE[2])
    assert len(ids) < len(CHINESE[2].encode()) and tokenizer.decode(ids) == CHINESE[2]


SMALL = {
    'word': 'hello',
    'letter': 'a',
    'character': '的',
    'chinese': ''.join(CHINESE)[:200],
    'digits': '1234567890' * 50,
    'newlines': '\n' * 500,
    'spaces': ' ' * 100,
    'zeros': '\0\0',
    'marks': '\u2581\u2585',
    'words': 'the cat sat on the mat. ' * 400,
    'line ends': '\r\n' * 9,
    'emoji': '👩\u200d👩\u200d👧',
}
GIVEN = 'a b  c\n的 \u2581\0 7'


CASES = [*((name, 'bpe') for name in SMALL), *((n, 'unigram') for n in ('letter', 'chinese'))]


@pytest.mark.parametrize(('name', 'kind'), CASES)
def test_text_of_few_words_gives_a_smaller_vocabulary(name, kind, caplog):
    caplog.set_level('INFO')
    tokenizer = train([SMALL[name]], vocab=2048, kind=kind)
    assert len(tokenizer_lib.CONTROL_NAMES) + 256 < tokenizer.vocab_size < 1024
    for text in (SMALL[name], GIVEN):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    if name == 'words':  # each is one piece, or two
        assert len(tokenizer.encode(SMALL[name])) < 8 * 400
    if name not in ('zeros', 'marks'):
        assert f'has {tokenizer.vocab_size} ids, not 2048' in caplog.text


def test_what_cannot_be_learnt():
    with pytest.raises(UserError, match=f'300 is too small: the least is {SMALLEST}'):
        train(['a'], vocab=300, kind='bpe')
    for texts in ([], ['']):
        with pytest.raises(UserError, match='no text'):
            train(texts, vocab=1024, kind='bpe')
    train(['abc ' * 100], vocab=SMALLEST, kind='bpe')


def test_training_on_text_without_a_space_learns_the_space():
    text = ''.join(CHINESE).replace(' ', '').replace('\n', '')
    trained = train([text], vocab=512, kind='bpe')
    for given in ('a b', ' 你  好 ', 'x\u2581y z'):
        assert trained.decode(trained.encode(given)) == given


def test_a_trainer_that_fails_is_one_line(monkeypatch):
    def settings_of(child):
        monkeypatch.setattr(train_tokenizer, '_CHILD', child)
        with pytest.raises(UserError) as caught:
            train(['some text'], vocab=600, kind='bpe')
        assert '\n' not in str(caught.value)
        return str(caught.value)

    killed = 'import os; os.kill(os.getpid(), 9)'
    assert 'ended with code -9' in settings_of(killed)
    assert 'lower --data.tokenizer.sample-bytes' in settings_of(killed)
    refused = 'import json; print(json.dumps({"error": "INTERNAL: why"}))'
    assert '(INTERNAL: why): give more or other text' in settings_of(refused)


SLOW = "import os, time; open({path!r}, 'w').write(str(os.getpid())); time.sleep(60)"


def _ended(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_signal_ends_training_and_its_process(monkeypatch, tmp_path, caplog):
    caplog.set_level('INFO')
    path = tmp_path / 'pid'
    monkeypatch.setattr(train_tokenizer, '_CHILD', SLOW.format(path=str(path)))
    monkeypatch.setattr(train_tokenizer, '_SILENT_SECONDS', 0.1)

    def interrupt():
        while not path.exists() or not path.read_text():
            time.sleep(0.02)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train(['some text'], vocab=600, kind='bpe')
    thread.join()
    assert time.monotonic() - start < 5
    assert _ended(int(path.read_text()))
    assert 'learning a bpe vocabulary of 600 from 0.0 M characters' in caplog.text


PARENT = """
import sys
from llama_jax.data import train_tokenizer
train_tokenizer._CHILD = train_tokenizer._CHILD.replace('lines = iter', {slow!r} + '; lines = iter')
train_tokenizer.train(['some text'], vocab=600, kind='bpe')
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='PR_SET_PDEATHSIG')
def test_the_trainer_goes_with_its_parent(tmp_path):
    path = tmp_path / 'pid'
    code = PARENT.format(slow=SLOW.format(path=str(path)))
    parent = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while (not path.exists() or not path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(path.read_text())
    parent.kill()
    parent.wait()
    while not _ended(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _ended(child)
