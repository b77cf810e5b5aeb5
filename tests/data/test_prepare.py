"""Preparing: the same data set by any number of processes, whole or not at all, in flat memory."""

import gzip
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from llama_jax.data import contents, parts, prepare, sources, splits, text_files, write
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.formats import Format
from llama_jax.data.sources import open_sources
from llama_jax.errors import UserError
from tests.data.corpus import CHINESE

SMALL = 1 << 13


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 8 KiB, so that small files have many."""
    monkeypatch.setattr(parts, 'CHUNK', SMALL)
    monkeypatch.setattr(contents, 'CHUNK', SMALL)


def source_of(*files, **settings):
    return Source('text_files', files=tuple(map(str, files)), **settings)


def stored(root):
    """(split, text, origin) of every record of a prepared data set, as TFDS reads it."""
    builder = tfds.builder_from_directory(root)
    return [
        (split, record['text'].decode(), record['origin'].decode())
        for split in builder.info.splits
        for record in builder.as_data_source(split)
    ]


def test_a_record_is_what_tfds_writes():
    features = tfds.features.FeaturesDict({n: tfds.features.Text() for n in ('text', 'origin')})
    for text in ('', 'a', CHINESE[0], CHINESE[0] * 999):
        ours = write.example({'text': text.encode(), 'origin': b'a.txt:1'})
        theirs = features.serialize_example({'text': text, 'origin': 'a.txt:1'})
        assert sorted(ours) == sorted(theirs)  # protocol buffers leave the order open
        assert features.deserialize_example_np(ours) == features.deserialize_example_np(theirs)


def test_tfds_opens_what_was_written(jsonl, own_cache):
    path = jsonl(CHINESE * 2)
    root = prepare.text_data_set(source_of(path))
    builder = tfds.builder_from_directory(root)
    info = builder.info
    assert info.full_name == f'text_files/{root.name}/{prepare._VERSION}'
    assert info.file_format.value == 'array_record'
    assert set(info.splits) == set(splits.NAMES)
    assert sum(info.splits[split].num_examples for split in info.splits) == 10
    assert info.splits['train'].num_bytes > 2 * len(CHINESE[0].encode())
    assert len(builder.as_data_source('train[:50%]')) == info.splits['train'].num_examples // 2
    origins = {origin for _, _, origin in stored(root)}
    assert origins == {f'documents.jsonl:{n}' for n in range(1, 11)}


@pytest.fixture
def corpus(tmp_path, modules):
    """Long lines and short ones, plain and compressed, large files and small ones."""
    root = tmp_path / 'corpus'
    root.mkdir()
    texts = [path.read_text('utf-8') for path in sorted(modules.iterdir())]
    (root / 'book.txt').write_text(''.join(texts[:3]), 'utf-8')
    (root / 'line.txt').write_text(CHINESE[0] * 900, 'utf-8')
    lines = ''.join(
        json.dumps({'text': text[:n]}) + '\n' for text in texts for n in range(99, 999, 30)
    )
    (root / 'lines.jsonl').write_text(lines + json.dumps({'text': texts[4] * 3}) + '\n' + lines)
    (root / 'more.jsonl.gz').write_bytes(gzip.compress(lines[:90_000].rpartition('\n')[0].encode()))
    for number, text in enumerate(CHINESE):
        (root / f'small{number}.md').write_text(text, 'utf-8')
    return root


def test_any_number_of_processes_gives_the_same_data_set(corpus, small_parts, tmp_path):
    prepared = []
    for processes in (0, 1, 2):
        source = source_of(corpus, data_dir=str(tmp_path / f'by{processes}'))
        prepared.append(stored(prepare.text_data_set(source, processes)))
    assert prepared[0] == prepared[1] == prepared[2]
    source = source_of(corpus)
    files, how = text_files.files_of(source)
    found = [
        document for file in files for document in text_files.documents(text_files.Span(file), how)
    ]
    records = [(text, origin) for _, text, origin in prepared[0]]

    def whole(some):  # of a book the pieces differ, for each part is cut by itself
        return sorted(d for d in some if not d[1].startswith(('book', 'line.')))

    assert whole(records) == whole(found)
    for name in ('book.txt', 'line.txt'):
        of_name = [record for record in records if record[1].startswith(name)]
        pieces = [(int(origin.split(':')[1]), text) for text, origin in of_name]
        text = (corpus / name).read_text('utf-8')
        assert sum(len(piece) for _, piece in pieces) == len(text)
        if name == 'book.txt':
            lines = text.splitlines(keepends=True)
            assert all(
                ''.join(lines[line - 1 :]).startswith(piece) or not piece.endswith('\n')
                for line, piece in pieces
            )


@pytest.mark.parametrize('encoding', ['utf-8', 'gb18030', 'latin-1', 'utf-16'])
@pytest.mark.parametrize('kind', ['text', 'lines'])
@pytest.mark.parametrize('shape', ['lines', 'one line', 'blank lines', 'a long line'])
def test_spans_are_the_file(kind, encoding, shape, tmp_path, small_parts):
    word = 'é' if encoding == 'latin-1' else '好a'
    text = {
        'lines': f'{word} {word}\n' * 9000,
        'one line': word * 60_000,
        'blank lines': (word * 40 + '\r\n\r\n') * 900,
        'a long line': f'{word}\n' * 2000 + word * 40_000 + f'\n{word}' * 2000,
    }[shape]
    path = tmp_path / 'a.txt'
    path.write_bytes(text.encode(encoding))
    content = path.read_bytes()
    (held,) = contents.contents([path], tmp_path / 'memory', 'a')
    file = text_files.File(path, 'a.txt', len(content), Format(kind))
    spans = list(parts._spans(file, held, SMALL, encoding))
    ranges = [content[span.start : span.stop] for span in spans]
    assert b''.join(ranges) == content and all(ranges)
    divisible = encoding != 'utf-16' and (
        shape != 'one line' or (kind == 'text' and encoding != 'gb18030')
    )
    assert (len(spans) > 1) == divisible
    for span, part in zip(spans, ranges, strict=True):
        part.decode(encoding)
        assert span.line == 1 + content[: span.start].count(b'\n')
        if span.start and (kind == 'lines' or shape != 'one line'):  # 160 kB are not too long a one
            assert content[span.start - 1 : span.start] == b'\n'


def test_parts_are_few_and_of_like_size(monkeypatch):
    file = text_files.File(Path('a'), 'a', 50, Format('text', 'gzip'))
    how = text_files.Reading('text', 'utf-8', 99)
    monkeypatch.setattr(parts, 'CHUNK', 100)
    divided = parts.divide([file] * 4000, [contents.Content('', ())] * 4000, how)
    assert 128 <= len(divided) <= 512
    assert [part.number for part in divided] == list(range(len(divided)))
    assert sum(len(part.spans) for part in divided) == 4000


def test_few_documents_fill_all_splits_or_it_is_said(tmp_path, own_cache):
    path = tmp_path / 'text.txt'
    path.write_text('\n'.join(f'{n} {CHINESE[n % 5]}' for n in range(200)), 'utf-8')
    for config in (
        DataConfig(sources=(source_of(path),)),
        DataConfig(sources=(source_of(path, document_characters=2000),)),
    ):
        sizes = [open_sources(config, split).sizes[0] for split in ('train', 'validation')]
        assert min(sizes) > 0
    one = DataConfig(sources=(source_of(path, document_characters=100_000),))
    with pytest.raises(UserError, match=r"no documents in the split 'validation' \(1 in train\)"):
        open_sources(one, 'validation')
    two = DataConfig(sources=(source_of(path, document_characters=5000),))
    assert open_sources(two, 'train').sizes == (1,) == open_sources(two, 'validation').sizes


def of_split(split, count):
    """Texts that the hash puts into one split."""
    texts = (f'{split} {n}' for n in range(10**6))
    return list(itertools.islice((t for t in texts if splits.by_hash(t) == split), count))


@pytest.mark.parametrize('held_out', [(0, 1), (1, 0), (1, 1), (5, 0), (0, 2), (2, 2)])
def test_training_is_never_empty(held_out, jsonl, own_cache):
    validation, test = held_out
    texts = [*of_split('validation', validation), *of_split('test', test)]
    found = stored(prepare.text_data_set(source_of(jsonl(texts * 2))))
    assert sorted(text for _, text, _ in found) == sorted(texts * 2)
    there = {split for split, _, _ in found}
    assert there == set(splits.NAMES[: len(texts)]) or there == {'train', 'validation'}
    by_text = {}
    for split, text, _ in found:
        assert by_text.setdefault(text, split) == split


def test_empty_files_are_skipped_and_counted(tmp_path, own_cache, caplog):
    names = {'a.txt': CHINESE[0], 'b.txt': '', 'c.md': ' \n', 'd.jsonl': '', 'e.json': '[]'}
    for name, text in names.items():
        (tmp_path / name).write_text(text, 'utf-8')
    root = prepare.text_data_set(source_of(*(tmp_path / name for name in names)))
    assert [text for _, text, _ in stored(root)] == [CHINESE[0]]
    assert '4 of 5 files hold no text and are skipped, such as b.txt' in caplog.text
    with pytest.raises(UserError, match="none of 2 files holds text, such as '.*b.txt'"):
        prepare.text_data_set(source_of(tmp_path / 'b.txt', tmp_path / 'c.md'))


def test_folders_behind_links_are_read_once(tmp_path, own_cache):
    """As a mounted disk or a cache of downloads is linked; a loop of links ends."""
    data, disk = tmp_path / 'data', tmp_path / 'disk/books'
    for folder in (data / 'own', disk):
        folder.mkdir(parents=True)
    (data / 'own/a.txt').write_text(CHINESE[0], 'utf-8')
    (disk / 'b.txt').write_text(CHINESE[1], 'utf-8')
    (data / 'books').symlink_to(disk)
    (data / 'again').symlink_to(disk)
    (data / 'mirror').symlink_to(data / 'own')
    (disk / 'back').symlink_to(data)
    root = prepare.text_data_set(source_of(data))
    assert sorted(text for _, text, _ in stored(root)) == sorted(CHINESE[:2])


def test_a_name_in_another_encoding_is_a_name(tmp_path, own_cache):
    """As archives that were packed in GBK leave it."""
    folder = os.fsencode(tmp_path) + b'/texts'
    os.mkdir(folder)
    for name in ('三国'.encode('gbk') + b'.txt', '水浒.txt'.encode()):
        with open(folder + b'/' + name, 'w', encoding='utf-8') as file:
            file.write(CHINESE[len(name) % 2])
    root = prepare.text_data_set(source_of(tmp_path / 'texts'))
    assert len(list(stored(root))) == 2


def test_files_are_read_again_only_when_they_changed(tmp_path, own_cache, monkeypatch):
    path = tmp_path / 'a.txt'
    path.write_text(CHINESE[0], 'utf-8')
    monkeypatch.setattr(contents, '_RACY_NS', 0)
    time.sleep(0.02)  # clocks of files are coarse
    first = contents.contents([path], tmp_path / 'memory', 'a')
    read = []
    digest = contents._digest
    monkeypatch.setattr(contents, '_digest', lambda *args: read.append(1) or digest(*args))
    assert contents.contents([path], tmp_path / 'memory', 'a') == first and not read
    stat = path.stat()
    path.write_text(CHINESE[0][::-1], 'utf-8')  # of the same size, and dated back
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = contents.contents([path], tmp_path / 'memory', 'a')
    assert second != first and read
    (note,) = (tmp_path / 'memory').glob('*.json')
    note.write_text('{')
    assert contents.contents([path], tmp_path / 'memory', 'a') == second


def test_a_file_just_written_is_not_trusted(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('a')
    contents.contents([path], tmp_path / 'memory', 'a')
    (note,) = (tmp_path / 'memory').glob('*.json')
    assert json.loads(note.read_text()) == {}


def test_moved_files_are_the_same_data_set(tmp_path, own_cache):
    for place in ('here', 'there'):
        (tmp_path / place).mkdir()
        (tmp_path / place / 'a.txt').write_text(CHINESE[0], 'utf-8')
    roots = {
        prepare.text_data_set(source_of(tmp_path / place / name))
        for place in ('here', 'there')
        for name in ('a.txt', '*.txt', '')
    }
    assert len(roots) == 1


def test_settings_make_another_data_set(tmp_path, own_cache):
    (tmp_path / 'a.txt').write_text('café ' * 99, 'latin-1')
    settings = (
        dict(encoding='latin-1'),
        dict(encoding='cp1250'),
        dict(encoding='latin-1', document_characters=9),
    )
    roots = [prepare.text_data_set(source_of(tmp_path / 'a.txt', **some)) for some in settings]
    assert len(set(roots)) == 3


def test_files_written_to_meanwhile_are_not_taken(tmp_path, own_cache, monkeypatch):
    path = tmp_path / 'a.txt'
    path.write_text(CHINESE[0], 'utf-8')
    run = parts.Job.run

    def late(job, seen):
        path.write_text(CHINESE[1], 'utf-8')
        return run(job, seen)

    monkeypatch.setattr(parts.Job, 'run', late)
    with pytest.raises(UserError, match=r"a.txt' was written to meanwhile"):
        prepare.text_data_set(source_of(path))
    monkeypatch.undo()
    monkeypatch.setenv('LLAMA_JAX_CACHE', str(own_cache))
    assert [t for _, t, _ in stored(prepare.text_data_set(source_of(path)))] == [CHINESE[1]]


def damages(root):
    shard = next(root.glob('*train*'))
    whole = shard.read_bytes()
    yield lambda: shard.write_bytes(whole[: len(whole) // 2])
    yield shard.unlink
    yield lambda: shard.write_bytes(b'\xff' * len(whole))
    yield lambda: (root / 'dataset_info.json').write_text('{')
    yield (root / 'features.json').unlink
    yield (root / 'sizes.json').unlink


def test_damage_of_the_cache_names_a_remedy_that_works(jsonl, own_cache):
    config = DataConfig(sources=(source_of(jsonl(CHINESE * 20)),))
    for number in range(6):
        whole = list(open_sources(config, 'train').sources[0])
        root = prepare.text_data_set(config.sources[0])
        list(damages(root))[number]()
        with pytest.raises(UserError) as caught:
            list(open_sources(config, 'train').sources[0])
        said = str(caught.value)
        assert 'is damaged' in said and f'`rm -r {root}`' in said and '\n' not in said
        subprocess.run(['rm', '-r', str(root)], check=True)
        assert list(open_sources(config, 'train').sources[0]) == whole


def test_a_record_travels_and_is_damaged_in_a_worker_too(jsonl, own_cache):
    import pickle

    config = DataConfig(sources=(source_of(jsonl(CHINESE * 20)),))
    documents = pickle.loads(pickle.dumps(open_sources(config, 'train').sources[0]))
    shard = next(prepare.text_data_set(config.sources[0]).glob('*train*'))
    shard.write_bytes(b'\xff' * shard.stat().st_size)
    with pytest.raises(UserError, match='is damaged .*rm -r'):
        documents[0]


def test_settings_without_effect_on_a_source():
    for setting in (
        dict(files=('a.txt',)),
        dict(exclude=('a',)),
        dict(encoding='latin-1'),
        dict(document_characters=5),
    ):
        (name,) = setting
        with pytest.raises(UserError, match=f'{name} has no effect .*sources.0.name text_files'):
            sources.check(DataConfig(sources=(Source('python_corpus/stdlib_code', **setting),)))


def test_a_data_directory_elsewhere_is_refused(tmp_path):
    (tmp_path / 'a.txt').write_text('a')
    with pytest.raises(UserError, match="data_dir of 'text_files' gs://b/c is no path"):
        prepare.text_data_set(source_of(tmp_path / 'a.txt', data_dir='gs://b/c'))


PEAK = """
import re, sys
from pathlib import Path
from llama_jax.data import prepare
from llama_jax.data.config import Source
def peak():  # getrusage would count what the process was before it began this program
    return int(re.search(r'VmHWM:\\s*(\\d+) kB', Path('/proc/self/status').read_text())[1])
idle = peak()
prepare.text_data_set(Source('text_files', files=(sys.argv[1],)), 0)
print((peak() - idle) * 1024 // 10**6)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='memory is counted otherwise')
def test_memory_does_not_follow_the_size_of_a_file(tmp_path, own_cache):
    path = tmp_path / 'line.txt'
    path.write_text('字 and words ' * 3_000_000, 'utf-8')  # 48 MB without a line end
    out = subprocess.run(
        [sys.executable, '-c', PEAK, str(path)], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) < 48, out.stdout
