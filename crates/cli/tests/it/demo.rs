use crate::program::Program;

#[test]
fn the_demo_shows_a_rate_and_finds_every_message_intact() {
    let ended = Program::run(["demo", "--seconds", "1"], b"");
    let text = String::from_utf8(ended.stdout).unwrap();
    assert_eq!(ended.status.code(), Some(0), "{text}{}", ended.stderr);
    assert!(text.contains("msg/s"), "{text}");
    assert!(text.lines().last().unwrap().starts_with("every message arrived intact"), "{text}");
}
