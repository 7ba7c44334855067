//! Splitting text into the words that byte-pair merges never cross.
//!
//! The split is a regular expression. One family of expressions, GPT-4's with digits in groups of
//! one to at most three, has a hand-written scanner; any other goes to `fancy-regex`, which is
//! also the scanner's referee in the tests.

use std::fmt;
use std::sync::OnceLock;

use regex_syntax::hir::{Class, HirKind};

/// Bytes that must follow the last text, so that words can be read 16 bytes at a time.
pub const PADDING: usize = 16;

/// What the scanner needs to know about a character.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Kind {
    /// Neither of the others: punctuation, symbols, marks, controls.
    Other = 0,
    /// `\p{L}`. Not `char::is_alphabetic`, which also holds for some marks and numbers.
    Letter = 1,
    /// `\p{N}`.
    Number = 2,
    /// `\s` (White_Space) without `\r` and `\n`.
    Space = 3,
    /// `\r` or `\n`.
    Newline = 4,
}

/// The kind of every code point, as a two-stage table: blocks of 256, equal blocks stored once.
struct Kinds {
    block_of: Vec<u16>,
    blocks: Vec<[Kind; 256]>,
}

impl Kinds {
    /// Asks `regex-syntax`, so that scanner and `fancy-regex` know the same Unicode version.
    fn build() -> Result<Kinds, PatternError> {
        let mut flat = vec![Kind::Other; 0x11_0000];
        for (class, kind) in
            [(r"\p{L}", Kind::Letter), (r"\p{N}", Kind::Number), (r"\s", Kind::Space)]
        {
            for (start, end) in ranges(class)? {
                flat[start as usize..=end as usize].fill(kind);
            }
        }
        flat['\r' as usize] = Kind::Newline;
        flat['\n' as usize] = Kind::Newline;
        let mut kinds = Kinds { block_of: Vec::new(), blocks: Vec::new() };
        for block in flat.chunks_exact(256) {
            let known = kinds.blocks.iter().position(|known| known == block);
            kinds.block_of.push(known.unwrap_or(kinds.blocks.len()) as u16);
            if known.is_none() {
                let mut copy = [Kind::Other; 256];
                copy.copy_from_slice(block);
                kinds.blocks.push(copy);
            }
        }
        Ok(kinds)
    }

    fn of(&self, c: char) -> Kind {
        self.blocks[self.block_of[c as usize >> 8] as usize][c as usize & 255]
    }
}

fn ranges(class: &str) -> Result<Vec<(char, char)>, PatternError> {
    let hir = regex_syntax::parse(class).map_err(|error| PatternError(error.to_string()))?;
    match hir.kind() {
        HirKind::Class(Class::Unicode(class)) => {
            Ok(class.iter().map(|range| (range.start(), range.end())).collect())
        }
        _ => Err(PatternError(format!("{class} is not a character class"))),
    }
}

/// A pattern that does not compile, or a text it cannot be matched against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PatternError(String);

impl fmt::Display for PatternError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the split pattern does not work: {}; see the fancy-regex syntax", self.0)
    }
}

impl std::error::Error for PatternError {}

/// A compiled split pattern.
pub enum Splitter {
    /// The GPT-4 family, by hand.
    Scanner(Box<Scanner>),
    /// Any other pattern.
    Regex(Box<fancy_regex::Regex>),
}

impl Splitter {
    /// Recognises the family by its spelling; compiles anything else.
    pub fn new(pattern: &str) -> Result<Splitter, PatternError> {
        for digits in 1..=3 {
            if family(digits).iter().any(|known| known == pattern) {
                return Ok(Splitter::Scanner(Box::new(Scanner::new(digits)?)));
            }
        }
        Splitter::regex(pattern)
    }

    /// Always `fancy-regex`, also for the family: the referee.
    pub fn regex(pattern: &str) -> Result<Splitter, PatternError> {
        let regex = fancy_regex::Regex::new(pattern);
        Ok(Splitter::Regex(Box::new(regex.map_err(|error| PatternError(error.to_string()))?)))
    }

    /// Calls `emit(start, end)` for every word of the texts `text[ends[i - 1]..ends[i]]`, in order,
    /// until it returns false. What the pattern does not match is skipped.
    ///
    /// `text` goes on for at least `PADDING` bytes after the last text.
    pub fn split(
        &self,
        text: &str,
        ends: &[usize],
        mut emit: impl FnMut(usize, usize) -> bool,
    ) -> Result<(), PatternError> {
        let mut start = 0;
        for &end in ends {
            match self {
                Splitter::Scanner(scanner) => {
                    if !scanner.scan(text, start, end, &mut emit) {
                        return Ok(());
                    }
                }
                Splitter::Regex(regex) => {
                    for found in regex.find_iter(&text[start..end]) {
                        let word = found.map_err(|error| PatternError(error.to_string()))?;
                        if !emit(start + word.start(), start + word.end()) {
                            return Ok(());
                        }
                    }
                }
            }
            start = end;
        }
        Ok(())
    }
}

/// The spellings of the family: ours, and how others write the same language. `cl100k_base`
/// itself is not in it: its `\s++$` keeps the newlines that end a text together.
fn family(digits: usize) -> [String; 3] {
    let (rest, tail) = (r"[^\r\n\p{L}\p{N}]", r"\s*[\r\n]|\s+(?!\S)|\s+");
    let contraction = "'(?i:[sdmt]|ll|ve|re)";
    let n = format!(r"\p{{N}}{{1,{digits}}}");
    [
        format!(r"{contraction}|{rest}?+\p{{L}}+|{n}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|{tail}"),
        format!(r"{contraction}|{rest}?\p{{L}}+|{n}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{tail}"),
        format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{rest}?\p{{L}}+|{n}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    ]
}

/// The family's scanner: one pass, no backtracking.
///
/// Most words are ASCII letters behind a space, and a scanner that looks at them byte by byte
/// mispredicts the end of each. So `scan` finds the end of up to eight letters at a time with
/// arithmetic on one `u64`, and leaves everything else to `word_end`.
pub struct Scanner {
    digits: usize,
    kinds: &'static Kinds,
    lead: [Lead; 256],
}

/// What the fast path of `scan` may do with a word's first byte.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lead {
    /// Leave the word to `word_end`.
    Slow,
    /// An ASCII letter: a word by itself.
    Letter,
    /// ASCII that belongs to letters that follow it.
    Prefix,
}

impl Scanner {
    fn new(digits: usize) -> Result<Scanner, PatternError> {
        static KINDS: OnceLock<Result<Kinds, PatternError>> = OnceLock::new();
        let kinds = KINDS.get_or_init(Kinds::build).as_ref().map_err(Clone::clone)?;
        let mut lead = [Lead::Slow; 256];
        for byte in 0..128u8 {
            lead[byte as usize] = match kinds.of(byte as char) {
                Kind::Letter => Lead::Letter,
                Kind::Space | Kind::Other if byte != b'\'' => Lead::Prefix,
                _ => Lead::Slow,
            };
        }
        Ok(Scanner { digits, kinds, lead })
    }

    /// Emits the words of `text[start..end]`; false when `emit` wants no more.
    #[inline]
    fn scan(
        &self,
        text: &str,
        start: usize,
        end: usize,
        emit: &mut impl FnMut(usize, usize) -> bool,
    ) -> bool {
        let (whole, bytes) = (&text[..end], text.as_bytes());
        let mut at = start;
        while at < end {
            let lead = self.lead[bytes[at] as usize];
            let mut letters = ascii_letters(bytes, at + 1);
            let mut next = at + 1 + letters;
            if lead == Lead::Slow || (lead == Lead::Prefix && letters == 0) || next > end {
                next = self.word_end(whole, at);
            } else {
                while letters == 8 && next < end {
                    letters = ascii_letters(bytes, next);
                    next += letters;
                }
                if next >= end {
                    next = end;
                } else if !bytes[next].is_ascii() {
                    next = self.run(whole, next, |kind| kind == Kind::Letter);
                }
            }
            if !emit(at, next) {
                return false;
            }
            at = next;
        }
        true
    }

    fn peek(&self, text: &str, at: usize) -> Option<(Kind, char, usize)> {
        let c = text[at..].chars().next()?;
        Some((self.kinds.of(c), c, at + c.len_utf8()))
    }

    /// The end of the longest run of `wanted` characters that starts at `at`.
    fn run(&self, text: &str, mut at: usize, wanted: impl Fn(Kind) -> bool) -> usize {
        while let Some((kind, _, next)) = self.peek(text, at) {
            if !wanted(kind) {
                break;
            }
            at = next;
        }
        at
    }

    /// The end of the word that starts at byte `start` (a character boundary inside `text`).
    fn word_end(&self, text: &str, start: usize) -> usize {
        let letter = |kind| kind == Kind::Letter;
        let Some((kind, first, next)) = self.peek(text, start) else {
            return text.len();
        };
        if first == '\'' {
            if let Some(end) = contraction(text, next) {
                return end;
            }
        }
        match kind {
            Kind::Letter => return self.run(text, next, letter),
            Kind::Number => return self.numbers(text, next),
            Kind::Newline => return self.whitespace(text, start),
            Kind::Space | Kind::Other => {}
        }
        let second = self.peek(text, next);
        match second {
            Some((Kind::Letter, _, after)) => self.run(text, after, letter),
            Some((Kind::Other, _, after)) if first == ' ' => self.symbols(text, after),
            _ if kind == Kind::Other => self.symbols(text, next),
            _ => self.whitespace(text, start),
        }
    }

    /// One number was read; at most `digits` belong together.
    fn numbers(&self, text: &str, mut at: usize) -> usize {
        for _ in 1..self.digits {
            match self.peek(text, at) {
                Some((Kind::Number, _, next)) => at = next,
                _ => break,
            }
        }
        at
    }

    /// The rest of `[^\s\p{L}\p{N}]++[\r\n]*`.
    fn symbols(&self, text: &str, at: usize) -> usize {
        let at = self.run(text, at, |kind| kind == Kind::Other);
        self.run(text, at, |kind| kind == Kind::Newline)
    }

    /// `\s*[\r\n]|\s+(?!\S)|\s+`: up to the last newline of the run if it has one; else all of a
    /// run that ends the text; else all but the last character, which belongs to the next word.
    fn whitespace(&self, text: &str, start: usize) -> usize {
        let (mut at, mut last, mut newline) = (start, start, None);
        while let Some((kind, _, next)) = self.peek(text, at) {
            match kind {
                Kind::Newline => newline = Some(next),
                Kind::Space => {}
                _ => break,
            }
            last = at;
            at = next;
        }
        match newline {
            Some(end) => end,
            None if at == text.len() || last == start => at,
            None => last,
        }
    }
}

/// How many of the (up to eight) bytes from `at` are ASCII letters before the first that is not.
///
/// Eight bytes at once: with the high bits out of the way, adding 31 or 5 carries into a byte's
/// high bit exactly when the lower-cased byte is at least `a`, or above `z`.
#[inline]
fn ascii_letters(bytes: &[u8], at: usize) -> usize {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    let word = u64::from_le_bytes(eight);
    let lower = (word | (ONES * 0x20)) & (ONES * 0x7F);
    let from_a = lower + ONES * 31;
    let above_z = lower + ONES * 5;
    let others = (!from_a | above_z | word) & (ONES * 0x80);
    others.trailing_zeros() as usize / 8
}

/// The end of `(?i:[sdmt]|ll|ve|re)` at byte `at`. Case folding lets `ſ` (U+017F) stand for `s`.
fn contraction(text: &str, at: usize) -> Option<usize> {
    let rest = &text.as_bytes()[at..];
    match rest {
        [b's' | b'S' | b'd' | b'D' | b'm' | b'M' | b't' | b'T', ..] => Some(at + 1),
        [b'l' | b'L', b'l' | b'L', ..] | [b'v' | b'V' | b'r' | b'R', b'e' | b'E', ..] => {
            Some(at + 2)
        }
        [0xC5, 0xBF, ..] => Some(at + 2),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(splitter: &Splitter, text: &str) -> Vec<String> {
        let padded = format!("{text}{}", "x".repeat(PADDING));
        let mut words = Vec::new();
        let emit = |start, end| {
            words.push(padded[start..end].to_owned());
            true
        };
        splitter.split(&padded, &[text.len()], emit).unwrap();
        words
    }

    fn check(text: &str, scanners: &[Splitter], referees: &[Splitter]) {
        for (scanner, referee) in scanners.iter().zip(referees) {
            assert_eq!(words(scanner, text), words(referee, text), "{text:?}");
        }
    }

    fn pairs(digits: std::ops::RangeInclusive<usize>) -> (Vec<Splitter>, Vec<Splitter>) {
        let patterns: Vec<String> = digits.flat_map(family).collect();
        patterns.iter().map(|p| (Splitter::new(p).unwrap(), Splitter::regex(p).unwrap())).unzip()
    }

    #[test]
    fn the_family_has_a_scanner_and_others_do_not() {
        for pattern in (1..=3).flat_map(family) {
            assert!(matches!(Splitter::new(&pattern), Ok(Splitter::Scanner(_))));
        }
        assert!(matches!(Splitter::new(r"\w+"), Ok(Splitter::Regex(_))));
        assert!(Splitter::new("(").is_err());
    }

    #[test]
    fn every_code_point_alone_and_in_company() {
        let (scanners, referees) = pairs(2..=2);
        for c in (0..=0x10_FFFF).filter_map(char::from_u32) {
            let mut text = String::new();
            for neighbour in ["", "a", "7", " ", "\n", "'"] {
                text.clear();
                text.extend([neighbour, c.encode_utf8(&mut [0; 4])]);
                check(&text, &scanners[..1], &referees[..1]);
                text.push_str(neighbour);
                check(&text, &scanners[..1], &referees[..1]);
            }
        }
    }

    #[test]
    fn short_texts_over_a_telling_alphabet() {
        let (scanners, referees) = pairs(1..=3);
        let alphabet: Vec<char> = "aſ7' \t\n\r.\u{301}\u{a0}é".chars().collect();
        let mut texts = vec![String::new()];
        for _ in 0..4 {
            texts = texts
                .iter()
                .flat_map(|text| alphabet.iter().map(move |c| format!("{text}{c}")))
                .collect();
            for text in &texts {
                check(text, &scanners, &referees);
            }
        }
    }
}
