"""Files as people have them: formats, compressions, encodings, and what is wrong with some."""

import bz2
import dataclasses
import gzip
import json
import lzma
import sys

import pytest

from llama_jax.data import formats, record_files, splits, text_files
from llama_jax.data.config import Source
from llama_jax.errors import UserError
from tests.data.corpus import CHINESE

BOOK = '\n\n'.join(CHINESE)
COMPRESS = {'': bytes, '.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress}


def read(*files, **settings):
    """(text, origin) of every document, as one process reads them."""
    source = Source('text_files', files=tuple(map(str, files)), **settings)
    found, how = text_files.files_of(source)
    return [d for file in found for d in text_files.documents(text_files.Span(file), how)]


def texts(*files, **settings):
    return [text for text, _ in read(*files, **settings)]


def json_lines(texts):
    return ''.join(json.dumps({'text': text}) + '\n' for text in texts)


CONTENTS = {
    'book.txt': (BOOK, [BOOK]),
    'BOOK.TXT': (BOOK, [BOOK]),
    'README': (BOOK, [BOOK]),
    'two.ndjson': ('{"text": "a b"}\n{"text": "c"}', ['a b', 'c']),
    'lines.JSONL': (json_lines(CHINESE) + '\n \n', list(CHINESE)),
    'lines.json': (json_lines(CHINESE), list(CHINESE)),
    'one.json': ('{"text": "a"}', ['a']),
    'pretty.json': (json.dumps({'text': BOOK}, indent=4) + '\n', [BOOK]),
    'array.json': (json.dumps([{'text': t} for t in CHINESE]), list(CHINESE)),
    'strings.json': (json.dumps(CHINESE), list(CHINESE)),
    'indented.json': (json.dumps([{'text': t} for t in CHINESE], indent=4), list(CHINESE)),
    'joined.json': ('{"text": "a"}{"text": "b"}\n\n{"text":\n"c"}', ['a', 'b', 'c']),
}


@pytest.mark.parametrize('name', CONTENTS)
@pytest.mark.parametrize('suffix', COMPRESS)
def test_formats_and_compressions(name, suffix, tmp_path):
    content, expected = CONTENTS[name]
    path = tmp_path / (name + (suffix.upper() if name.isupper() else suffix))
    path.write_bytes(COMPRESS[suffix](content.encode()))
    assert texts(path) == expected


def test_compression_is_told_by_content(tmp_path):
    path = tmp_path / 'lines.jsonl'
    path.write_bytes(gzip.compress(json_lines(CHINESE).encode()))
    assert texts(path) == list(CHINESE)


def test_text_that_begins_as_compressed_files_do(tmp_path):
    (tmp_path / 'name.txt').write_text('BZhang')
    assert texts(tmp_path / 'name.txt') == ['BZhang']
    (tmp_path / 'empty.bz2').write_bytes(bz2.compress(b''))
    assert texts(tmp_path / 'empty.bz2') == []


def test_gzip_of_several_members(tmp_path):
    path = tmp_path / 'lines.jsonl.gz'
    halves = (json_lines(CHINESE[:2]), json_lines(CHINESE[2:]))
    path.write_bytes(b''.join(gzip.compress(half.encode()) for half in halves))
    assert texts(path) == list(CHINESE)


def test_zstandard_whole_and_cut(tmp_path):
    zstandard = pytest.importorskip('zstandard')
    content = json_lines(CHINESE).encode()
    frames = [zstandard.compress(content[:99]), zstandard.compress(content[99:])]
    path = tmp_path / 'lines.jsonl.zst'
    path.write_bytes(b''.join(frames))
    assert texts(path) == list(CHINESE)
    path.write_bytes(b''.join(frames)[:-9])
    with pytest.raises(UserError, match=r"cannot read '.*lines.jsonl.zst' \(it ends in the midst"):
        texts(path)
    path.write_bytes(frames[0] + b'\xff' * 64 + frames[1])
    with pytest.raises(UserError, match="cannot read '.*lines.jsonl.zst'"):
        texts(path)


def test_zstandard_without_the_package_says_how(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'zstandard', None)
    monkeypatch.setitem(sys.modules, 'compression.zstd', None)
    path = tmp_path / 'a.txt.zst'
    path.write_bytes(b'\x28\xb5\x2f\xfd rest')
    with pytest.raises(UserError, match='a.txt.zst.*`pip install zstandard`'):
        texts(path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    parquet = pytest.importorskip('pyarrow.parquet')
    path = tmp_path / 'rows.PARQUET'
    table = pyarrow.table({'body': list(CHINESE), 'n': list(range(5))})
    parquet.write_table(table, path, row_group_size=2)
    assert read(path, field='body')[1] == (CHINESE[1], 'rows.PARQUET:2')
    assert texts(path, field='body') == list(CHINESE)
    with pytest.raises(UserError, match=r"has no column 'text' \(there: body, n\)"):
        texts(path)
    with pytest.raises(UserError, match=r"row 1 has no text in the field 'n'"):
        texts(path, field='n')
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match='cannot read .*rows.PARQUET'):
        texts(path, field='body')


def test_parquet_without_the_package_says_how(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    (tmp_path / 'a.parquet').write_bytes(b'PAR1')
    with pytest.raises(UserError, match='a.parquet.*`pip install pyarrow`'):
        texts(tmp_path / 'a.parquet')


@pytest.mark.parametrize('encoding', ['gb18030', 'big5', 'utf-16', 'utf-16-be', 'utf-32', 'utf-8'])
@pytest.mark.parametrize('name', ['book.txt', 'lines.jsonl', 'array.json'])
def test_encodings(name, encoding, tmp_path):
    content, expected = CONTENTS.get(name) or (json_lines(CHINESE), list(CHINESE))
    path = tmp_path / name
    path.write_bytes(content.replace('\\u', '\\u').encode(encoding))
    if name == 'lines.jsonl':
        lines = ''.join(json.dumps({'text': t}, ensure_ascii=False) + '\r\n' for t in CHINESE)
        path.write_bytes(lines.encode(encoding))
    assert texts(path, encoding=encoding) == expected


def test_a_mark_of_utf_8_is_no_text(tmp_path):
    for name in ('book.txt', 'one.json', 'two.ndjson', 'array.json'):
        content, expected = CONTENTS[name]
        path = tmp_path / name
        path.write_bytes(content.encode('utf-8-sig'))
        assert texts(path) == texts(path, encoding='utf-8-sig') == expected


def test_text_is_kept_exactly(tmp_path):
    path = tmp_path / 'dos.txt'
    path.write_bytes(b'one \r\n\r\ntwo\rthree\x0c\n')
    assert texts(path) == ['one \r\n\r\ntwo\rthree\x0c\n']


WIDE = {
    'bom.txt': (BOOK.encode('utf-16'), 'utf-16'),
    'big.txt': ('plain English text\n'.encode('utf-16-be'), 'utf-16-be'),
    'little.jsonl': (json_lines('abc').encode('utf-16-le'), 'utf-16-le'),
    'bom.jsonl': (json_lines('abc').encode('utf-16'), 'utf-16'),
    'bom32.txt': (BOOK.encode('utf-32'), 'utf-32'),
}


@pytest.mark.parametrize('name', WIDE)
def test_wide_text_names_the_setting_that_reads_it(name, tmp_path):
    content, encoding = WIDE[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf'encoding of its source \(.*\) to {encoding}\b'):
        texts(path)
    assert texts(path, encoding=encoding)


DAMAGED = {
    'not.txt.gz': (b'plain text', r"is no gzip file \(it begins with b'plai'\)"),
    'not.parquet': (b'plain text', 'is no Parquet file'),
    'pointer.jsonl': (b'version https://git-lfs.github.com/spec/v1\n', '`git lfs pull`'),
    'texts.txt': (b'PK\x03\x04zip', 'is a zip archive: unpack'),
    'broken.json': (b'[{"text": "a"}, {"text"', r"broken.json' is no JSON after 1 records"),
    'comma.json': (b'[{"text": "a"} {"text": "b"}]', 'a comma is missing'),
    'open.json': (b'[{"text": "a"},', 'the array does not end'),
    'trailing.json': (b'[{"text": "a"},]', 'is no JSON after 1 records'),
    'two.json': (b'[{"text": "a"}] []', 'something follows the array'),
    'deep.json': (b'[' + b'[' * 200_000, 'is no JSON after 0 records'),
    'strings.json': (b'["a", 1]', r"record 2 has no text in the field 'text' \(there: int\)"),
    'deep.jsonl': (b'{"text": ' + b'[' * 200_000 + b'\n', 'line 1 is JSON nested too deeply'),
    'bytes.jsonl': (b'{"text": "a"}\n{"text": "\xff"}\n', r'line 2 is no UTF-8 text \(its byte 10'),
    'half.txt': ('好'.encode()[:2], r'no UTF-8 text \(byte 0\), which ends within a character'),
    'cut.txt': (
        ('好' * 9).encode()[:-1],
        r'\(byte 24\), which ends within .*: give the whole file',
    ),
    'late.txt': (b'a' * 3_000_000 + b'\xff', r'is no UTF-8 text \(byte 3000000\): set'),
    'zero.txt': (b'abc' * 500_000 + b'\x00def', r'is binary \(a zero byte at 1500000\)'),
}


@pytest.mark.parametrize('name', DAMAGED)
def test_damaged_files_are_named(name, tmp_path):
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts(tmp_path / name)
    assert name in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('suffix', ['.gz', '.bz2', '.xz'])
def test_damage_in_the_midst_of_a_compressed_file(suffix, tmp_path, modules):
    lines = json_lines([path.read_text('utf-8') for path in sorted(modules.iterdir())]).encode()
    whole = bytearray(COMPRESS[suffix](lines))
    path = tmp_path / f'd.jsonl{suffix}'
    middle = len(whole) // 2
    for damaged in (
        whole[:middle] + b'\xff' * 64 + whole[middle + 64 :],
        whole[:middle],
        whole[:-9],
    ):
        path.write_bytes(damaged)
        with pytest.raises(
            UserError, match=rf"cannot read '.*d.jsonl{suffix}' \(.+\): give a whole"
        ):
            texts(path)


def test_the_first_ten_bad_lines_are_told_together(tmp_path):
    path = tmp_path / 'd.jsonl'
    good = '{"text": "a"}'
    lines = [good, '{"text": 1, "id": 2}', good, '[]', '{', '{"body": "b"}']
    path.write_text('\n'.join(lines))
    with pytest.raises(UserError) as caught:
        texts(path)
    said = str(caught.value)
    for part in (
        "d.jsonl', line 2 has no text in the field 'text' (there: text, id)",
        "; line 4 has no text in the field 'text' (there: list)",
        '; line 5 is no JSON (',
        "; line 6 has no text in the field 'text' (there: body)",
    ):
        assert part in said
    path.write_text('\n'.join(['{'] * 30))
    with pytest.raises(UserError) as caught:
        texts(path)
    assert str(caught.value).count('is no JSON') == 10 and 'line 10 ' in str(caught.value)


def test_a_record_too_long_for_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / 'rows.json'
    path.write_text(json.dumps([{'text': 'short'}, {'text': 'long ' * 1000}]))
    monkeypatch.setattr(formats, 'BLOCK', 100)
    assert len(texts(path)) == 2
    monkeypatch.setattr(record_files, '_MOST_CHARACTERS', 1000)
    with pytest.raises(UserError, match='after 1 records .one of more than 2..30 characters'):
        texts(path)


def test_half_of_a_surrogate_pair_is_replaced(tmp_path):
    path = tmp_path / 'd.jsonl'
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    assert texts(path) == ['a\ufffdb 😀']


def test_settings_without_effect_or_sense(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text(BOOK, 'utf-8')
    for settings, message in (
        (dict(field='body'), "field 'body' has no effect"),
        (dict(encoding='klingon'), "there is no encoding 'klingon'"),
        (dict(encoding='rot13'), "there is no encoding 'rot13'"),
        (dict(document_characters=0), 'document_characters is 0'),
        (dict(document_characters=1 << 25), 'document_characters is 33554432'),
        (dict(exclude=('*.md',)), r"exclude '\*.md' matches no file"),
        (dict(exclude=('*.txt',)), 'exclude leaves none of the files'),
    ):
        with pytest.raises(UserError, match=message):
            texts(path, **settings)


def test_directories_globs_and_names_that_look_like_globs(tmp_path, caplog, monkeypatch):
    for name in ('a.txt', 'sub/b.md', 'sub/.hidden', '.git/config', 'sub/min/c.js', 'data[1].txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / 'picture.png').write_bytes(b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR')
    (tmp_path / 'sub' / 'index.dat').write_bytes(b''.join(n.to_bytes(4, 'big') for n in range(99)))
    (tmp_path / 'sub' / 'archive.zip').write_bytes(b'PK\x03\x04')
    everything = ['a.txt', 'data[1].txt', 'sub/b.md', 'sub/min/c.js']
    assert texts(tmp_path) == everything
    assert '3 files are no text and are left out, such as picture.png' in caplog.text
    texts(tmp_path)
    assert caplog.text.count('are left out') == 1
    assert [origin for _, origin in read(tmp_path)] == [f'{name}:1' for name in everything]
    assert texts(tmp_path, exclude=('*.js', 'a.*')) == ['data[1].txt', 'sub/b.md']
    assert texts(tmp_path, exclude=('sub/*',)) == ['a.txt', 'data[1].txt']
    assert texts(tmp_path / 'data[1].txt') == ['data[1].txt']
    assert texts(tmp_path / '*.txt') == ['a.txt', 'data[1].txt']
    assert texts(tmp_path / '**' / '*.md') == ['sub/b.md']
    assert texts(tmp_path / 'sub' / 'b.md', tmp_path) == [
        'sub/b.md',
        *everything[:2],
        everything[3],
    ]
    monkeypatch.setenv('HOME', str(tmp_path))
    assert texts('~/a.txt') == ['a.txt']
    with pytest.raises(UserError, match='picture.png'):  # named itself, it is an error
        texts(tmp_path / 'picture.png')


def test_files_elsewhere_are_refused_by_name():
    for name in ('gs://bucket/a.txt', 's3://b/*.jsonl', 'https://host/a.txt'):
        with pytest.raises(UserError, match=f'the file {name[:4]}.*is no path of this machine'):
            texts(name)


def test_origins_are_lines(tmp_path):
    path = tmp_path / 'book.txt'
    path.write_text('first\nsecond\n\nfourth line is longer\nfifth\n')
    assert read(path, document_characters=16) == [
        ('first\nsecond\n\n', 'book.txt:1'),
        ('fourth line is ', 'book.txt:4'),
        ('longer\nfifth\n', 'book.txt:4'),
    ]
    path = tmp_path / 'd.jsonl'
    path.write_text('\n' + json_lines(['one two three', 'four']))
    assert read(path, document_characters=8) == [
        *[(piece, 'd.jsonl:2') for piece in ('one two ', 'three')],
        ('four', 'd.jsonl:3'),
    ]


def test_pieces_are_cut_at_blank_lines_lines_spaces_or_anywhere():
    assert text_files.cut('aaa\n\nbb\ncc', 8) == ['aaa\n\n', 'bb\ncc']
    assert text_files.cut('aaa\r\n\r\nbb\ncc', 9) == ['aaa\r\n\r\n', 'bb\ncc']
    assert text_files.cut('aaaa\nb b', 7) == ['aaaa\n', 'b b']
    assert text_files.cut('aaaa b', 5) == ['aaaa ', 'b']
    assert text_files.cut('a\n' + 'b' * 9, 6) == ['a\nbbbb', 'bbbbb']
    assert text_files.cut('字' * 7, 3) == ['字字字', '字字字', '字']
    assert text_files.cut('', 3) == [] and text_files.cut('abc', 3) == ['abc']
    assert text_files.cut('abc', 1) == ['a', 'b', 'c']


def test_texts_in_blocks_are_cut_as_in_one(tmp_path, modules, monkeypatch):
    text = ''.join(path.read_text('utf-8') for path in sorted(modules.iterdir()))
    path = tmp_path / 'all.txt'
    path.write_text(text, 'utf-8')
    monkeypatch.setattr(formats, 'BLOCK', 1000)
    assert texts(path, document_characters=700) == text_files.cut(text, 700)
    many = [{'text': text[: 3000 + n]} for n in range(40)]
    for content in (json.dumps(many), json.dumps(many, indent=1), '\n'.join(map(json.dumps, many))):
        path = tmp_path / 'all.json'
        path.write_text(content)
        assert texts(path) == [one['text'] for one in many]


def test_large_files_have_long_documents_and_small_ones_enough_to_hold_some_out(tmp_path):
    def most(*sizes, **settings):
        path = tmp_path / 'a.txt'
        path.touch()
        file = text_files.files_of(Source('text_files', files=(str(path),)))[0][0]
        files = [dataclasses.replace(file, size=size) for size in sizes]
        return text_files._characters(Source('text_files', **settings), files)

    assert most(10**9) == 1 << 19
    assert 200_000 > most(40_000_000) >= 100_000
    assert most(1_100_000) == 16_384
    assert most(*[10_000] * 20) == 16_384  # enough of them: they stay whole
    assert most(16_000) == 1024
    assert most(16_000, document_characters=5000) == 5000


def test_splits_are_known_from_the_bytes_of_a_text():
    assert splits.position(BOOK) == splits.position(BOOK.encode())
