// Rust's strings, slices, structs and enums, as parameters.

/// std::hint::black_box, which Debian 12's rustc has not yet.
#[inline(never)]
fn black_box<T>(value: T) {
    unsafe { std::ptr::read_volatile(&std::mem::ManuallyDrop::new(std::ptr::read(&value))) };
    std::mem::forget(value);
}

#[derive(Clone, Copy)]
pub struct Point {
    pub x: f64,
    pub n: i32,
}

#[derive(Clone, Copy)]
#[allow(dead_code)]
pub enum Colour {
    Red,
    Green = 7,
}

pub struct User {
    pub name: String,
    pub age: u32,
    pub at: Point,
}

#[no_mangle]
#[inline(never)]
pub fn greet(name: &str, user: &User, owned: &String, times: i16, loud: bool) -> usize {
    black_box((name, user, owned));
    name.len() + user.age as usize + owned.len() + times as usize + loud as usize
}

#[no_mangle]
#[inline(never)]
pub fn paint(colour: Colour, shade: f32, numbers: &[u32]) -> i64 {
    black_box((shade, numbers));
    -(colour as i64) - numbers.len() as i64
}

#[allow(dead_code)]
pub enum Message {
    Quit,
    Move { x: i32, y: i32 },
    Write(String),
    Numbers(u8, u64),
}

#[no_mangle]
#[inline(never)]
pub fn hold(a: &Message, b: &Message, c: &Message, d: &Message, some: Option<&User>, none: Option<&User>) -> usize {
    black_box((a, b, c, d, some, none));
    0
}

#[no_mangle]
#[inline(never)]
pub fn keep(ages: &Vec<u32>, boxed: Box<User>, few: &Option<u32>, little: &Option<u32>, times: i64) -> usize {
    black_box((ages, &boxed, few, little));
    ages.len() + times as usize
}

fn main() {
    let user = User { name: String::from("alice"), age: 30, at: Point { x: 1.5, n: -4 } };
    let owned = String::from("a text of its own");
    let a = greet("bob", &user, &owned, 2, true);
    let b = paint(Colour::Green, 0.25, &[10, 20, 30]);
    let m = [Message::Move { x: 1, y: -2 }, Message::Quit, Message::Write(String::from("a note")), Message::Numbers(5, 600)];
    let c = hold(&m[0], &m[1], &m[2], &m[3], Some(&user), None);
    let other = User { name: String::from("carol"), age: 31, at: Point { x: 0.0, n: 0 } };
    let d = keep(&vec![30, 31, 32], Box::new(other), &Some(7), &None, -9);
    println!("{} {}", c, d);
    println!("{} {}", a, b);
}
