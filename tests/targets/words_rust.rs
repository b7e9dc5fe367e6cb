// Rust's strings, slices, structs and enums, as parameters.
use std::hint::black_box;

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

fn main() {
    let user = User { name: String::from("alice"), age: 30, at: Point { x: 1.5, n: -4 } };
    let owned = String::from("a text of its own");
    let a = greet("bob", &user, &owned, 2, true);
    let b = paint(Colour::Green, 0.25, &[10, 20, 30]);
    println!("{} {}", a, b);
}
