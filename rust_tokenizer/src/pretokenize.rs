//! Splits text into words, whose boundaries byte-pair merges never cross.
//!
//! The split is defined by a regular expression. One family, GPT-4's pattern with digits in groups
//! of at most one, two or three, has a hand-written scanner; any other pattern uses `fancy-regex`,
//! which is also the scanner's reference in the tests.

use std::fmt;
use std::sync::OnceLock;

use regex_syntax::hir::{Class, HirKind};

use crate::window::{self, Starts, WINDOW};

/// Padding bytes after the last text, so that a window or packed word can be read anywhere.
pub const PADDING: usize = WINDOW;

/// The character classes of the scanner.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Kind {
    /// Everything else: punctuation, symbols, marks, control characters.
    Other = 0,
    /// `\p{L}`. Not `char::is_alphabetic`, which also accepts some marks and numbers.
    Letter = 1,
    /// `\p{N}`.
    Number = 2,
    /// `\s` (White_Space) without `\r` and `\n`.
    Space = 3,
    /// `\r` or `\n`.
    Newline = 4,
}

/// The class of every code point, as a two-stage table: blocks of 256, equal ones stored once.
struct Kinds {
    block_of: Vec<u16>,
    blocks: Vec<[Kind; 256]>,
}

impl Kinds {
    /// Built with `regex-syntax`, so that scanner and `fancy-regex` agree on the Unicode version.
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

/// The pattern does not compile, or matching failed on a text.
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
    /// The hand-written scanner of the GPT-4 family.
    Scanner(Box<Scanner>),
    /// Any other pattern.
    Regex(Box<fancy_regex::Regex>),
}

impl Splitter {
    /// Recognises the family by its source text; compiles any other pattern.
    pub fn new(pattern: &str) -> Result<Splitter, PatternError> {
        for digits in 1..=3 {
            if family(digits).iter().any(|known| known == pattern) {
                return Ok(Splitter::Scanner(Box::new(Scanner::new(digits)?)));
            }
        }
        Splitter::regex(pattern)
    }

    /// Always uses `fancy-regex`, even for the family: the reference.
    pub fn regex(pattern: &str) -> Result<Splitter, PatternError> {
        let regex = fancy_regex::Regex::new(pattern);
        Ok(Splitter::Regex(Box::new(regex.map_err(|error| PatternError(error.to_string()))?)))
    }

    /// Calls `emit(start, end)` for every word of the texts `text[ends[i - 1]..ends[i]]`, in order,
    /// until it returns false. Text that the pattern does not match is skipped.
    ///
    /// `text` must have at least `PADDING` bytes after the last text.
    pub fn split(
        &self,
        text: &str,
        ends: &[usize],
        mut emit: impl FnMut(usize, usize) -> bool,
    ) -> Result<(), PatternError> {
        let mut start = 0;
        let mut go_on = true;
        for &end in ends {
            let mut emit = |start, end| {
                go_on = emit(start, end);
                go_on
            };
            self.split_text(text, start, end, &mut emit)?;
            if !go_on {
                break;
            }
            start = end;
        }
        Ok(())
    }

    /// `split` for the one text `text[start..end]`.
    #[inline]
    pub fn split_text(
        &self,
        text: &str,
        start: usize,
        end: usize,
        emit: &mut impl FnMut(usize, usize) -> bool,
    ) -> Result<(), PatternError> {
        match self {
            Splitter::Scanner(scanner) => scanner.scan(text, start, end, emit),
            Splitter::Regex(regex) => {
                for found in regex.find_iter(&text[start..end]) {
                    let word = found.map_err(|error| PatternError(error.to_string()))?;
                    if !emit(start + word.start(), start + word.end()) {
                        break;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The spellings of the family: ours, and equivalent ones. `cl100k_base` itself is not equivalent:
/// its `\s++$` keeps the newlines at the end of a text together.
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
/// `window` finds the starts of plain ASCII words 64 bytes at a time; where it cannot decide,
/// `word_end` scans character by character.
pub struct Scanner {
    digits: usize,
    kinds: &'static Kinds,
}

impl Scanner {
    fn new(digits: usize) -> Result<Scanner, PatternError> {
        static KINDS: OnceLock<Result<Kinds, PatternError>> = OnceLock::new();
        let kinds = KINDS.get_or_init(Kinds::build).as_ref().map_err(Clone::clone)?;
        Ok(Scanner { digits, kinds })
    }

    /// Emits the words of `text[start..end]` until `emit` returns false.
    #[inline]
    fn scan(
        &self,
        text: &str,
        start: usize,
        end: usize,
        emit: &mut impl FnMut(usize, usize) -> bool,
    ) {
        let whole = &text[..end];
        let mut base = start;
        while base < end {
            let mut window = [0; WINDOW];
            window.copy_from_slice(&text.as_bytes()[base..base + WINDOW]);
            let Starts { mut starts, doubt } = window::starts(&window, end - base, self.digits);
            let mut at = base;
            starts &= !1;
            loop {
                let known = (doubt & (!0 << (at - base))).trailing_zeros();
                while starts.trailing_zeros() < known {
                    let next = base + starts.trailing_zeros() as usize;
                    starts &= starts - 1;
                    if !emit(at, next) {
                        return;
                    }
                    at = next;
                }
                if at >= end || at - base > WINDOW / 2 {
                    break;
                }
                let next = self.word_end(whole, at);
                if !emit(at, next) {
                    return;
                }
                at = next;
                if at >= end || at - base >= WINDOW {
                    break;
                }
                starts &= (!0 << 1) << (at - base);
            }
            base = at;
        }
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

    /// One digit was read; a word has at most `digits` of them.
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
    use proptest::prelude::*;

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

    /// Scanners of the whole family and their referees, compiled once.
    fn pairs() -> (&'static [Splitter], &'static [Splitter]) {
        static PAIRS: OnceLock<(Vec<Splitter>, Vec<Splitter>)> = OnceLock::new();
        let (scanners, referees) = PAIRS.get_or_init(|| {
            let patterns = (1..=3).flat_map(family);
            patterns.map(|p| (Splitter::new(&p).unwrap(), Splitter::regex(&p).unwrap())).unzip()
        });
        (scanners, referees)
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
        let (scanners, referees) = pairs();
        let (scanners, referees) = (&scanners[3..4], &referees[3..4]); // ours
        let all: Vec<char> = (0..=0x10_FFFF).filter_map(char::from_u32).collect();
        for some in all.chunks(256) {
            let mut text = String::new();
            for &c in some {
                check(c.encode_utf8(&mut [0; 4]), scanners, referees);
                for n in ['a', '7', ' ', '\n', '\''] {
                    text.extend([n, c, n, '"', '"', n, c, 'z', '.', 'z', c, n, '\r', 'z', c, '\t']);
                }
            }
            check(&text, scanners, referees);
        }
    }

    #[test]
    fn short_texts_over_a_telling_alphabet() {
        let (scanners, referees) = pairs();
        let alphabet: Vec<char> = "aſ7' \t\n\r.\u{301}\u{a0}é".chars().collect();
        let mut texts = vec![String::new()];
        for _ in 0..4 {
            texts = texts
                .iter()
                .flat_map(|text| alphabet.iter().map(move |c| format!("{text}{c}")))
                .collect();
            for text in &texts {
                check(text, scanners, referees);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

        #[test]
        fn any_text(text in "\\PC{0,100}") {
            let (scanners, referees) = pairs();
            check(&text, &scanners[2..7], &referees[2..7]);
        }

        #[test]
        fn long_texts_of_telling_pieces(
            pieces in prop::collection::vec(prop::sample::select(PIECES), 0..120),
        ) {
            let (scanners, referees) = pairs();
            check(&pieces.concat(), &scanners[2..7], &referees[2..7]);
        }
    }

    const PIECES: &[&str] = &[
        " ",
        " ",
        " ",
        " ",
        "  ",
        "   ",
        "\n",
        "\r\n",
        "\t",
        "\u{a0}",
        "\u{2028}",
        "a",
        "the",
        "The",
        "Word",
        "internationalization",
        "é",
        "ſ",
        "日本",
        "\u{301}",
        "7",
        "42",
        "1984",
        "٣",
        "½",
        "123456789",
        "'",
        "''",
        "'s",
        "'ll",
        "'VE",
        ".",
        ",",
        "-",
        "--",
        "—",
        "(",
        "\0",
        "🙂",
        "\u{ff07}",
    ];
}
