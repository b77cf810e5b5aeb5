import ast
import dataclasses
import gzip
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from llama_jax.data import deduplicate, python_corpus, python_files, sources, splits, text_files
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.documents import Documents, plain
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.data.sources import documents, open_sources
from llama_jax.errors import UserError
from llama_jax.text.tokenizer import TokenizerConfig
from tests.data.corpus import CHINESE


def of(*sources, **settings):
    return DataConfig(sources=sources, **settings)


def files(*paths, **settings):
    return of(Source('text_files', files=tuple(map(str, paths)), **settings))


@pytest.fixture(scope='session')
def stdlib(cache):
    """Every record of stdlib_code by split."""
    builder = sources.builder(Source('python_corpus/stdlib_code'))
    return {name: list(builder.as_data_source(name)) for name in splits.NAMES}


def test_stdlib_code_is_source_by_module(stdlib):
    by_module = {r['module'].decode(): r for split in stdlib.values() for r in split}
    import argparse

    with open(argparse.__file__, encoding='utf-8') as file:
        assert by_module['argparse']['text'].decode() == file.read()
    assert by_module['json.decoder']['package'] == b'json'
    assert len(by_module) > 400
    for module in by_module:
        assert not {'test', 'tests', 'idle_test'} & set(module.split('.')[:-1])
    assert sum(len(r['text']) for r in stdlib['train']) > 5_000_000


def test_stdlib_code_splits_by_module_in_stored_order(stdlib):
    for name, records in stdlib.items():
        modules = [r['module'].decode() for r in records]
        assert modules == sorted(modules)
        assert {splits.by_hash(module) for module in modules} == {name}


def test_held_out_modules_are_no_near_duplicates_of_training_modules(stdlib):
    texts = [r['text'].decode() for name in splits.NAMES for r in stdlib[name]]
    assert not any(deduplicate.near_duplicates(texts))
    # The tables of `encodings` repeat each other: of about 70 single-byte ones few remain.
    tables = [r for r in stdlib['train'] if r['module'].startswith(b'encodings.cp')]
    assert len(tables) < 25


def test_near_duplicates_are_found_by_containment(modules):
    argparse, shlex = ((modules / f'{n}.py').read_text() for n in ('argparse', 'shlex'))
    renamed = shlex.replace('self', 'this', 3)
    both = argparse[:20_000] + shlex
    texts = [argparse, shlex, renamed, both, 'import os', 'import  os\n', 'import sys', '']
    assert deduplicate.near_duplicates(texts) == [
        *(False, False, True, True),
        *(False, True, False, False),
    ]


def test_docstrings_have_their_function_beside_them():
    (path,) = [path for module, path in python_files.python_files('stdlib') if module == 'heapq']
    records = {r['module']: r for r in python_files.docstring_records('heapq', path)}
    push = records['heapq.heappush']
    assert push['text'] == 'Push item onto heap, maintaining the heap invariant.'
    assert push['docstring'] == push['text'] and push['package'] == 'heapq'
    assert push['body'].startswith('def heappush(heap, item):\n    heap.append(item)')
    assert push['text'] not in push['body']
    assert records['heapq']['body'] == ''
    for record in records.values():
        ast.parse(record['body'])
    topics = {r['module']: r for r in python_files.topic_records()}
    assert 'lambda' in topics['pydoc_data.topics.lambda']['text']


def test_modules_are_those_of_the_library_without_tests_and_installed_packages(
    tmp_path, monkeypatch
):
    files = ['a.py', 'b/__init__.py', 'b/test.py', 'b/c/d.py', 'b/data.txt']
    skipped = ['test/e.py', 'b/tests/deep/f.py', 'site-packages/g.py', '_sysconfigdata_h.py']
    for name in [*files, *skipped, 'pydoc_data/topics.py']:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(python_files.sysconfig, 'get_path', lambda key: str(tmp_path))
    expected = {'a': 'a.py', 'b': 'b/__init__.py', 'b.c.d': 'b/c/d.py', 'b.test': 'b/test.py'}
    expected = [(module, tmp_path / name) for module, name in expected.items()]
    assert python_files.python_files('stdlib') == python_files.python_files('installed') == expected


def test_tensorflow_is_never_imported(cache):
    code = (
        'import sys; from llama_jax.data.config import DataConfig;'
        'from llama_jax.data.sources import documents; from llama_jax.data import loader;'
        'print(len(next(documents(DataConfig(), "train"))), "tensorflow" in sys.modules)'
    )
    out = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=100
    )
    assert out.stdout.split()[1:] == ['False'], out.stdout


def test_text_files_hold_every_character_once(modules, config):
    found = [text for split in splits.NAMES for text in documents(_split(config, split), 'train')]
    together = ''.join(path.read_text('utf-8') for path in modules.iterdir())
    assert sorted(''.join(found)) == sorted(together)
    for path in modules.iterdir():
        text = path.read_text('utf-8')
        assert all(piece in found for piece in text_files.cut(text, 16_384))


def _split(config, name):
    return dataclasses.replace(config, train_split=name)


def test_text_files_read_chinese(tmp_path, own_cache):
    path = tmp_path / '三國.txt'
    path.write_text('\n\n'.join(CHINESE), 'utf-8-sig')
    (text,) = documents(files(path), 'train')
    assert text == '\n\n'.join(CHINESE)


def test_json_lines_plain_and_compressed(jsonl, own_cache, tmp_path):
    path = jsonl(CHINESE, field='body')
    packed = tmp_path / 'more.jsonl.gz'
    packed.write_bytes(gzip.compress(path.read_bytes().replace('大勢'.encode(), b'')))
    for name in (path, packed):
        config = files(name, field='body')
        found = [t for split in splits.NAMES for t in documents(_split(config, split), 'train')]
        assert sorted(found) == sorted(CHINESE)
    with pytest.raises(UserError, match=r"documents.jsonl', line 1 .*'text' \(there: body\)"):
        open_sources(files(path), 'train')


def test_equal_documents_share_a_split_and_small_corpora_have_all_splits(jsonl, own_cache):
    config = files(jsonl([*CHINESE, *CHINESE]))
    found = {split: list(documents(_split(config, split), 'train')) for split in splits.NAMES}
    assert all(found.values())
    assert not set(found['train']) & (set(found['validation']) | set(found['test']))
    assert sorted(sum(found.values(), [])) == sorted(CHINESE * 2)


def test_text_files_are_cached_by_content(tmp_path, own_cache):
    path = tmp_path / 'poem.txt'
    path.write_text(CHINESE[0], 'utf-8')
    first = open_sources(files(path), 'train')
    assert open_sources(files(path), 'train').digest == first.digest
    path.write_text(CHINESE[1], 'utf-8')
    second = open_sources(files(path), 'train')
    assert second.digest != first.digest and list(second.sources[0]) == [CHINESE[1]]


BAD_FILES = {
    'empty.txt': (b'', 'holds no text'),
    'blank.txt': (b' \n\n ', 'holds no text'),
    'zero.txt': (b'abc\x00def', r'is binary \(a zero byte at 3\)'),
    'latin.txt': ('café'.encode('latin-1'), r'no UTF-8 text \(byte 3\).*encoding of its source'),
    'list.jsonl': (b'[1]\n', r"line 1 has no text in the field 'text' \(there: list\)"),
    'broken.jsonl': (b'{"text": "a"}\n{"text"\n', 'line 2 is no JSON'),
    'cut.jsonl.gz': (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], 'cannot read'),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_files_without_text_are_named(name, tmp_path, own_cache):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_sources(files(tmp_path / name), 'train')
    assert name in str(caught.value) and '\n' not in str(caught.value)


def test_globs_without_a_match_and_no_files(tmp_path):
    with pytest.raises(UserError, match=r"no file matches '.*\*\.md'"):
        open_sources(files(tmp_path / '*.md'), 'train')
    with pytest.raises(UserError, match='text_files without files'):
        open_sources(files(), 'train')


def test_an_empty_split_is_named(tmp_path, own_cache):
    path = tmp_path / 'one.txt'
    path.write_text(CHINESE[0], 'utf-8')
    with pytest.raises(
        UserError,
        match=r"'validation' \(1 in train\): give more text, or train without validation",
    ):
        open_sources(files(path), 'validation')


def test_mixtures_without_sources_or_weight():
    with pytest.raises(UserError, match='no data'):
        open_sources(of(), 'train')
    with pytest.raises(UserError, match="weight of 'text_files' is 0"):
        open_sources(of(Source('text_files', weight=0)), 'train')


class Verses(tfds.core.GeneratorBasedBuilder):
    """Any other data set of tensorflow-datasets."""

    code_path = python_corpus.PythonCorpus.code_path
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        features = {'verse': tfds.features.Text(), 'number': tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for number, verse in enumerate(CHINESE):
            yield number, {'verse': verse, 'number': number}


@pytest.fixture(scope='module')
def verses(tmp_path_factory):
    path = tmp_path_factory.mktemp('tfds')
    Verses(data_dir=str(path), file_format='array_record').download_and_prepare()
    return path


def test_any_data_set_by_name_version_directory_and_slice(verses):
    directory = verses / 'verses' / '1.0.0'
    for name, data_dir in (('verses', verses), ('verses:1.0.0', verses), (str(directory), None)):
        source = Source(name, data_dir=data_dir and str(data_dir), field='verse')
        assert sorted(documents(of(source), 'train')) == sorted(CHINESE)
    config = of(source, train_split='train[:60%]', validation_split='train[60%:]')
    parts = [list(documents(config, split)) for split in ('train', 'validation')]
    assert [len(part) for part in parts] == [3, 2] and len(set(sum(parts, []))) == 5


def test_a_data_set_that_is_not_there_or_not_like_that(verses, tmp_path):
    def open_one(name='verses', field='verse', data_dir=verses, split='train'):
        source = Source(name, data_dir=str(data_dir), field=field)
        open_sources(of(source, validation_split=split), 'validation')

    open_one()
    with pytest.raises(UserError, match="no data set 'wikipedia/20231101.en'.*array_record"):
        open_one(name='wikipedia/20231101.en')
    with pytest.raises(UserError, match='no data set .verses:2.0.0'):
        open_one(name='verses:2.0.0')
    with pytest.raises(UserError, match=r"no text field 'text' \(there: number, verse\)"):
        open_one(field='text')
    with pytest.raises(UserError, match="no text field 'number'"):
        open_one(field='number')
    with pytest.raises(UserError, match=r"no documents in the split 'validation' \(5 in train\)"):
        open_one(split='validation')
    with pytest.raises(UserError, match='python_corpus/ has stdlib_code'):
        open_one(name='python_corpus/stdlib')
    # Stored otherwise: the description says so, the files are never opened.
    other = tmp_path / 'verses' / '1.0.0'
    other.mkdir(parents=True)
    for path in (verses / 'verses' / '1.0.0').glob('*.json'):
        (other / path.name).write_text(path.read_text().replace('array_record', 'tfrecord'))
    with pytest.raises(UserError, match="stored as tfrecord.*file_format='array_record'"):
        open_one(data_dir=tmp_path)


def test_tokenizers_are_cached_by_content(jsonl, own_cache, modules):
    recipe = TokenizerConfig(vocab=600)
    small, large = (
        dataclasses.replace(files(modules / name), tokenizer=recipe)
        for name in ('shlex.py', 's*.py')
    )
    first = load_tokenizer(small)
    (path,) = (own_cache / 'tokenizers').glob('*.model')
    before = path.stat().st_mtime_ns
    assert load_tokenizer(small).digest == first.digest
    assert path.stat().st_mtime_ns == before
    assert load_tokenizer(large).digest != first.digest
    from_file = dataclasses.replace(small, tokenizer=TokenizerConfig(path=str(path)))
    assert load_tokenizer(from_file).digest == first.digest
    path = min((own_cache / 'tokenizers').glob('*.model'), key=lambda path: path.stat().st_mtime_ns)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=f'is damaged .*: delete {path}; the same command'):
        load_tokenizer(small)
    path.unlink()
    assert load_tokenizer(small).digest == first.digest


def _prepare(modules, queue):
    config = dataclasses.replace(files(modules / '*.py'), tokenizer=TokenizerConfig(vocab=700))
    queue.put((load_tokenizer(config).digest, open_sources(config, 'train').digest))


@pytest.mark.slow
def test_two_processes_may_prepare_at_once(modules, own_cache):
    spawn = multiprocessing.get_context('spawn')
    queue = spawn.Queue()
    workers = [spawn.Process(target=_prepare, args=(modules, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    first, second = (queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert first == second
    assert len(list((own_cache / 'datasets').glob('*.lock'))) == 1
    assert len(list((own_cache / 'tokenizers').glob('*.model'))) == 1


def test_a_full_disk_is_reported(jsonl, own_cache, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr('llama_jax.data.prepare.os.rename', full)
    with pytest.raises(UserError, match=r'No space left on device.*LLAMA_JAX_CACHE'):
        open_sources(files(jsonl(CHINESE)), 'train')


def test_bytes_that_are_no_utf_8_are_marked_not_fatal():
    """A data set of others may hold them, far from its beginning."""
    records = [{'text': b'a\xffb'}, {'text': '世界'.encode()[:5]}]
    made = Documents('made', records, 'text', '', 0, ValueError, Source('made'))
    assert list(made) == ['a\ufffdb', '世\ufffd']
    assert plain(tfds.features.Text(), b'a\xffb') == 'a\ufffdb'
