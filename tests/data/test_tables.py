"""Tables of text (.csv, .tsv): rows are documents, or records."""

import csv
import gzip
import io

import hypothesis
import pytest
from hypothesis import strategies as st

from llama_jax.data import record_files, text_files
from llama_jax.data.config import Source
from llama_jax.errors import UserError

BY_HAND = (
    'id,text,label\r\n'
    '1,"A ""quoted"" word, a comma\r\nand a line end",x\r\n'
    '2,plain,y\r\n'
    '\r\n'
    '3,"你好，世界",\r\n'
)
TEXTS = ['A "quoted" word, a comma\r\nand a line end', 'plain', '你好，世界']


def read(path, *, field='text', **settings):
    source = Source('text_files', files=(str(path),), field=field, **settings)
    files, how = text_files.files_of(source)
    return [one for file in files for one in text_files.documents(text_files.Span(file), how)]


@pytest.mark.parametrize(
    ('name', 'content', 'settings'),
    [
        ('a.csv', BY_HAND.encode(), {}),
        ('a.CSV', b'\xef\xbb\xbf' + BY_HAND.encode(), {}),  # as spreadsheets write UTF-8
        ('a.csv', BY_HAND.encode('gb18030'), {'encoding': 'gb18030'}),
        ('a.csv.gz', gzip.compress(BY_HAND.encode()), {}),
        ('a.csv', BY_HAND.rstrip().encode(), {}),
    ],
)
def test_rows_are_documents(tmp_path, name, content, settings):
    (tmp_path / name).write_bytes(content)
    found = read(tmp_path / name, **settings)
    assert [text for text, _ in found] == TEXTS
    assert [origin for _, origin in found] == [f'{name}:{line}' for line in (3, 4, 6)]


@pytest.mark.parametrize('delimiter', ',;\t')
@hypothesis.given(st.lists(st.text(st.characters(codec='utf-8', exclude_characters='\0'))))
def test_what_a_spreadsheet_writes_comes_back(delimiter, texts):
    file = io.StringIO(newline='')
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([['n', 'text'], *enumerate(texts)])
    blocks = iter([file.getvalue()[i : i + 7] for i in range(0, len(file.getvalue()), 7)])
    found = list(record_files.from_table(blocks, 'a.csv', field='text'))
    assert [text for text, _ in found] == texts


def test_a_table_without_the_column_is_text_and_this_is_said(tmp_path, caplog):
    (tmp_path / 'a.csv').write_text('id,body\n1,x\n')
    assert [text for text, _ in read(tmp_path / 'a.csv')] == ['id,body\n1,x\n']
    assert "no column 'text'" in caplog.text and 'columns: id, body' in caplog.text
    assert '.field' in caplog.text
    assert [text for text, _ in read(tmp_path / 'a.csv', field='body')] == ['x']
    with pytest.raises(UserError, match="field 'story' has no effect"):
        read(tmp_path / 'a.csv', field='story')


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (
            'id,text\n1,"open\n2,x\n',
            'what follows line 1 is no row of a table .*rename the file to .txt',
        ),
        ('id,text\n1,x,y,z\n', 'line 2 has more cells than the first line names'),
        ('text,id\nx,1\n\ny\n', None),  # a row may have fewer
        ('id,text\n7\n', "line 2 has no text in the field 'text' .there: id"),
    ],
)
def test_what_is_no_table_is_told_by_its_line(tmp_path, content, words):
    (tmp_path / 'a.csv').write_text(content)
    if words is None:
        assert [text for text, _ in read(tmp_path / 'a.csv')] == ['x', 'y']
    else:
        with pytest.raises(UserError, match=words):
            read(tmp_path / 'a.csv')


@pytest.mark.parametrize(
    ('name', 'content', 'texts'),
    [
        ('a.tsv', 'id\ttext\n1\t"He said" yes\n2\tb\n', ['"He said" yes', 'b']),
        ('a.tsv', 'id\ttext\n1\t"a\n', ['"a']),
        ('a.tsv', 'id\ttext\n1\t"a ""b"""\n', ['a "b"']),
        ('a.csv', 'text,id\nhello,1,\n,,\nb,2\n', ['hello', 'b']),  # a comma more
        ('a.csv', 'id, text\n1, a\n', [' a']),  # a text is kept as it stands
        ('a.csv', '"text";"a,b,c"\nx;y\n', ['x']),
    ],
)
def test_tables_as_they_are_found(tmp_path, name, content, texts):
    (tmp_path / name).write_text(content)
    assert [text for text, _ in read(tmp_path / name)] == texts


def test_a_column_that_is_named_twice_is_refused(tmp_path):
    (tmp_path / 'a.csv').write_text('text,text\nhello,1\n')
    with pytest.raises(UserError, match='names a column twice .text, text.: rename one'):
        read(tmp_path / 'a.csv')


def test_a_table_beside_records_is_left_out_of_them(tmp_path, caplog):
    (tmp_path / 'a.jsonl').write_text('{"text": "one"}\n')
    (tmp_path / 'labels.csv').write_text('id,name\n0,x\n')
    files, _ = text_files.files_of(Source(text_files.RECORDS, files=(str(tmp_path),)))
    assert [file.name for file in files] == ['a.jsonl'] and 'labels.csv' in caplog.text
    named = str(tmp_path / 'a.jsonl'), str(tmp_path / 'labels.csv')
    files, _ = text_files.files_of(Source(text_files.RECORDS, files=named))
    assert len(files) == 2


def test_rows_are_records(tmp_path):
    (tmp_path / 'a.csv').write_text(BY_HAND, newline='')
    source = Source(text_files.RECORDS, files=(str(tmp_path / 'a.csv'),))
    (file,), how = text_files.files_of(source)
    found = [text for text, _ in text_files.documents(text_files.Span(file), how)]
    assert found[1] == '{"id":"2","text":"plain","label":"y"}'


@pytest.mark.parametrize('name', ['a.csv', 'a.jsonl'])
def test_whole_records_of_texts_are_found_by_their_origins(tmp_path, name):
    lines = {
        'a.csv': 'text,genre\none,"n\ne"\ntwo,p\nthree,q\n',
        'a.jsonl': '{"text": "one", "genre": "n\\ne"}\n{"text": "two", "genre": "p"}\n{"t": 3}\n',
    }
    (tmp_path / name).write_text(lines[name])
    (tmp_path / 'b.txt').write_text('one')
    source = Source('text_files', files=(str(tmp_path / name), str(tmp_path / 'b.txt')))
    origins = [f'{name}:{3 if name == "a.csv" else 1}', f'{name}:{4 if name == "a.csv" else 2}']
    found = text_files.whole_records(source, [*origins, 'b.txt:1', 'gone.jsonl:1'])
    assert text_files.fields_of(source) == {'text', 'genre'}
    # The third, which is damaged, is not read.
    assert [found[origin]['genre'] for origin in origins] == ['n\ne', 'p'] and len(found) == 2
