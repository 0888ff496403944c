from tokenizers import Tokenizer as Backend
from tokenizers import models

from engine.token_pieces import NOTHING, Piece, Pieces


def pieces(*tokens: str, byte_level: bool) -> Pieces:
    backend = Backend(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=tokens[0]))
    return Pieces(backend, frozenset([0]), byte_level=byte_level)


def test_bytes_that_are_whole_characters_have_a_text() -> None:
    made = pieces("<s>", "Ġfox", "Ã©", "Ã", "東", byte_level=True)
    assert made[1] == Piece(b" fox", " fox")
    assert made[2] == Piece("é".encode(), "é")
    assert made[3] == Piece(b"\xc3", None)
    assert made[4] == Piece("東".encode(), "東"), "an added token is written as it is"


def test_sentence_piece_tokens_are_a_text_or_a_byte() -> None:
    made = pieces("<s>", "▁fox", "<0xE2>", "<0xE2>x", byte_level=False)
    assert made[1] == Piece(b"", " fox")
    assert made[2] == Piece(b"\xe2", None)
    assert made[3] == Piece(b"", "<0xE2>x")


def test_only_tokens_of_the_vocabulary_are_kept() -> None:
    made = pieces("<s>", "a", byte_level=True)
    assert made[0] is NOTHING
    assert made[77] is NOTHING
    assert made[1] is made[1]
    assert list(made) == [1]
