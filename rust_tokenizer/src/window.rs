//! Finds the word starts in 64 bytes at once, for the scanner's pattern family.
//!
//! A byte-by-byte scanner mispredicts a branch at the end of nearly every word. Here each class of
//! ASCII characters is a `u64` bit mask over a window of 64 bytes, and the pattern becomes a few
//! shifts and ands: bit i describes byte i, `<< 1` refers to the previous byte and `>> 1` to the
//! next.

/// Bytes in a window.
pub const WINDOW: usize = 64;

/// The bytes of a window by character class, as bit masks.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
struct Classes {
    letters: u64,
    numbers: u64,
    /// `\t` `\n` `\x0b` `\x0c` `\r`
    controls: u64,
    newlines: u64,
    blanks: u64,
    quotes: u64,
    /// Not ASCII.
    wide: u64,
}

/// The words after the first one, which starts at bit 0.
#[derive(Clone, Copy, Debug)]
pub struct Starts {
    /// Word starts. Valid only below the first bit of `doubt`.
    pub starts: u64,
    /// Where the window cannot decide: non-ASCII text and its neighbours, and a few rare cases
    /// that would take many more operations.
    pub doubt: u64,
}

/// The word starts in a window at the start of a word, `length` bytes before the end of the text.
/// The end of the text counts as a start.
#[inline]
pub fn starts(window: &[u8; WINDOW], length: usize, digits: usize) -> Starts {
    let (inside, end) = if length < WINDOW { ((1 << length) - 1, 1 << length) } else { (!0, 0) };
    let Classes { letters, numbers, controls, newlines, blanks, quotes, wide } = classify(window);
    let (letters, numbers, newlines) = (letters & inside, numbers & inside, newlines & inside);
    let white = (controls | blanks) & inside;
    let spaces = white & !newlines;
    let others = inside & !(letters | numbers | white | wide);

    // A symbol starts a word unless a symbol or a blank precedes it. Letters right after such a
    // start belong to the same word.
    let symbols = others & !(others << 1) & !(blanks << 1);
    let words = letters & !(letters << 1) & !(spaces << 1) & !(symbols << 1);
    // A whitespace word ends at the run's last newline; newlines after symbols belong to those; the
    // rest of the run is one word, except its last space, which belongs to the next word.
    let gaps = (white & !(white << 1) & !(newlines & (others << 1)))
        | (spaces & (newlines << 1))
        | (spaces & !(white >> 1));
    // Every `digits`-th digit of a run starts a word; the first two are found here.
    let first = numbers & !(numbers << 1);
    let mut full = numbers;
    for behind in 1..=digits {
        full &= numbers << behind;
    }
    let second = (first << digits) & full;
    // In doubt: the rest of the run (found by the carry), and runs after non-ASCII digits.
    let unknown = ((second << digits) & full) | (numbers & (wide << 1));
    let unknown = numbers & !numbers.wrapping_add(unknown);

    let contractions = (quotes & symbols) << 1 & (letters | wide);
    let mut doubt = contractions | unknown | (spaces & (end >> 1));
    // In doubt: whether a newline comes later in a whitespace run.
    let mut later = (spaces & (newlines >> 1)) | (wide & inside) | (1 << (WINDOW - 1)) & inside;
    loop {
        let wider = later | (later >> 1 & (white | others));
        if wider == later {
            break;
        }
        later = wider;
    }
    doubt |= later;
    Starts { starts: symbols | words | gaps | first | second | end, doubt }
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn classify(window: &[u8; WINDOW]) -> Classes {
    use std::arch::x86_64::*;
    let mut classes = Classes::default();
    for part in 0..WINDOW / 16 {
        // SAFETY: SSE2 is part of x86-64, and the 16 bytes are inside the window.
        unsafe {
            let bytes = _mm_loadu_si128(window.as_ptr().add(16 * part).cast());
            let is = |byte: u8| _mm_cmpeq_epi8(bytes, _mm_set1_epi8(byte as i8));
            // Signed comparisons: non-ASCII bytes are negative and so in no range.
            let between = |bytes, low: u8, high: u8| {
                let from = _mm_cmpgt_epi8(bytes, _mm_set1_epi8(low as i8 - 1));
                _mm_and_si128(from, _mm_cmplt_epi8(bytes, _mm_set1_epi8(high as i8 + 1)))
            };
            let lower = _mm_or_si128(bytes, _mm_set1_epi8(0x20));
            let bits = |mask| u64::from(_mm_movemask_epi8(mask) as u32) << (16 * part);
            classes.letters |= bits(between(lower, b'a', b'z'));
            classes.numbers |= bits(between(bytes, b'0', b'9'));
            classes.controls |= bits(between(bytes, b'\t', b'\r'));
            classes.newlines |= bits(_mm_or_si128(is(b'\n'), is(b'\r')));
            classes.blanks |= bits(is(b' '));
            classes.quotes |= bits(is(b'\''));
            classes.wide |= bits(bytes);
        }
    }
    classes
}

#[cfg(not(target_arch = "x86_64"))]
use classify_portably as classify;

/// The same on eight bytes at a time with ordinary arithmetic.
#[cfg(any(test, not(target_arch = "x86_64")))]
#[inline]
fn classify_portably(window: &[u8; WINDOW]) -> Classes {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    let mut classes = Classes::default();
    for (part, bytes) in window.chunks_exact(8).enumerate() {
        let word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        // With the high bits cleared, the addition carries into a byte's high bit exactly when the
        // byte is large enough.
        let at_least = |word: u64, low: u8| (word & (ONES * 0x7F)) + ONES * u64::from(0x80 - low);
        let between = |low: u8, high: u8| at_least(word, low) & !at_least(word, high + 1) & !word;
        let lower = word | (ONES * 0x20);
        let letters = at_least(lower, b'a') & !at_least(lower, b'z' + 1) & !word;
        let bits = |mask: u64| {
            let gathered = ((mask >> 7) & ONES).wrapping_mul(0x0102_0408_1020_4080) >> 56;
            gathered << (8 * part)
        };
        classes.letters |= bits(letters);
        classes.numbers |= bits(between(b'0', b'9'));
        classes.controls |= bits(between(b'\t', b'\r'));
        classes.newlines |= bits(between(b'\n', b'\n') | between(b'\r', b'\r'));
        classes.blanks |= bits(between(b' ', b' '));
        classes.quotes |= bits(between(b'\'', b'\''));
        classes.wide |= bits(word);
    }
    classes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_classify_agree() {
        for byte in 0..=255u8 {
            for at in 0..WINDOW {
                for rest in [0, b'a', b'\n', b' ', 0xFF] {
                    let mut window = [rest; WINDOW];
                    window[at] = byte;
                    assert_eq!(classify(&window), classify_portably(&window), "{byte} at {at}");
                }
            }
        }
    }
}
