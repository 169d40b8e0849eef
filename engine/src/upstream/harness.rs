//! The decoder of CONNECT's answers, for a fuzz target.

use super::http::{Answer, Decoder, Malformed};

/// Decodes `bytes` whole and in pieces: the result must be the same.
pub(crate) fn answer(pieces: &[u8], bytes: &[u8]) {
    let mut sizes = pieces.iter().cycle().map(|size| usize::from(*size).max(1));
    let mut rest = bytes;
    let in_pieces = decode(|| {
        let (piece, left) = rest.split_at(sizes.next().unwrap_or(1).min(rest.len()));
        rest = left;
        piece
    });
    let mut rest = Some(bytes);
    let whole = decode(|| rest.take().unwrap_or_default());
    match (whole, in_pieces) {
        (Ok(whole), Ok(part)) => {
            assert_eq!((whole.status, &whole.reason), (part.status, &part.reason));
            assert_eq!(whole.other_schemes_only, part.other_schemes_only);
            assert!(whole.early.starts_with(&part.early) && bytes.ends_with(&whole.early));
            assert!((200..=599).contains(&whole.status));
            assert!(!whole.reason.chars().any(char::is_control));
        }
        // What is quoted of something that is not HTTP depends on the first piece.
        (Err(Malformed::NotHttp(_)), Err(Malformed::NotHttp(_))) => {}
        (whole, part) => assert_eq!(whole, part),
    }
}

/// Feeds what `next` gives until it is empty.
fn decode<'a>(mut next: impl FnMut() -> &'a [u8]) -> Result<Answer, Malformed> {
    let mut decoder = Decoder::default();
    loop {
        let piece = next();
        if piece.is_empty() {
            return Err(decoder.end());
        }
        if let Some(answer) = decoder.feed(piece)? {
            return Ok(answer);
        }
    }
}
