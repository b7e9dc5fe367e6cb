// Types, variables and lines of Rust as debug information describes them; see shapes.c.

/// std::hint::black_box, which Debian 12's rustc has not yet.
#[inline(never)]
fn black_box<T>(value: T) -> T {
    let kept = unsafe { std::ptr::read_volatile(&value) };
    std::mem::forget(value);
    kept
}

pub struct Point {
    x: i32,
    y: i64,
}

pub enum Message {
    Quit,
    Move { x: i32, y: i32 },
    Write(String),
    Numbers(u8, u64),
}

#[derive(Clone, Copy)]
pub enum Small {
    One = 1,
    Two = 20,
}

pub static COUNTER: i32 = 17;

pub mod inner {
    #[inline(never)]
    pub fn total(numbers: &[u32], factor: u32) -> u32 {
        let mut sum = 0;
        for number in numbers {
            sum += number * factor; // HERE loop
        }
        super::black_box(sum) // HERE total
    }
}

impl Point {
    #[inline(never)]
    fn length(&self, scale: i64) -> i64 {
        let product = self.y * scale; // HERE method
        black_box(product + self.x as i64)
    }
}

#[inline(never)]
fn describe(message: &Message, name: &str, maybe: Option<&Point>, small: Small) -> usize {
    let length = name.len(); // HERE describe
    let extra = match message {
        Message::Quit => 0,
        Message::Move { x, y } => (x + y) as usize,
        Message::Write(text) => text.len(),
        Message::Numbers(a, b) => *a as usize + *b as usize,
    };
    length + extra + maybe.map_or(0, |p| p.x as usize) + small as usize // HERE described
}

fn main() {
    let point = Point { x: 3, y: 4 };
    let messages = vec![
        Message::Quit,
        Message::Move { x: 1, y: 2 },
        Message::Write("text".to_string()),
        Message::Numbers(5, 6),
    ];
    let mut result = inner::total(&[1, 2, 3], 2) as usize;
    for message in &messages {
        result += describe(message, "name", Some(&point), Small::Two); // HERE main
    }
    println!("{} {} {}", result, point.length(5), black_box(&COUNTER));
    black_box(Small::One);
}
