use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};

use crate::program::{Folder, Program, text};
use crate::usage::commands;

fn completions(shell: &str) -> String {
    let ended = Program::run(["completions", shell], b"");
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    String::from_utf8(ended.stdout).unwrap()
}

/// What bash says to a script, if there is one.
fn bash(script: &str) -> Option<String> {
    let mut bash = Command::new("bash");
    bash.args(["--norc", "--noprofile"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut bash = match bash.spawn() {
        Err(error) => {
            eprintln!("skipped: bash does not start: {error}");
            return None;
        }
        Ok(bash) => bash,
    };
    bash.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let output = bash.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn bash_completes_commands_and_their_options() {
    let script = completions("bash");
    for (words, last, expected) in [
        ("buffstreams li", 1, "listen"),
        ("buffstreams bench --rat", 2, "--rate"),
        ("buffstreams listen --output he", 3, "hex"),
    ] {
        let ask = format!(
            "{script}\nCOMP_WORDS=({words})\nCOMP_CWORD={last}\n_buffstreams buffstreams \"${{COMP_WORDS[{last}]}}\" \
             \"${{COMP_WORDS[{}]}}\"\necho \"${{COMPREPLY[@]}}\"\n",
            last - 1
        );
        let Some(said) = bash(&ask) else { return };
        assert_eq!(said.trim(), expected, "{words}");
    }
}

#[test]
fn every_shell_has_completions_that_name_every_command() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = completions(shell);
        for command in commands() {
            assert!(script.contains(&command), "{command} for {shell}");
        }
    }
}

#[test]
fn there_is_a_page_for_the_program_and_for_every_command() {
    let folder = Folder::new();
    let pages = folder.path("man1");
    let ended = Program::run(["man", &text(&pages)], b"");
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    let written: BTreeSet<String> =
        pages.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let expected =
        commands().into_iter().map(|name| format!("buffstreams-{name}.1")).chain(["buffstreams.1".to_owned()]);
    assert_eq!(written, expected.collect());
    for name in &written {
        let page = std::fs::read_to_string(pages.join(name)).unwrap();
        assert!(page.contains(".SH NAME"), "{name}");
        let title = page.lines().find(|line| line.starts_with(".TH ")).unwrap();
        assert!(title.contains(concat!("\"buffstreams ", env!("CARGO_PKG_VERSION"), "\"")), "{name}: {title}");
        assert!(page.contains(".SH EXAMPLES") || name == "buffstreams.1", "{name}");
    }
    assert_eq!(Program::run(["man"], b"").stdout, std::fs::read(pages.join("buffstreams.1")).unwrap());

    let groff = Command::new("groff")
        .args(["-man", "-Tutf8", "-ww", "-z"])
        .args(written.iter().map(|name| pages.join(name)))
        .output();
    match groff {
        Err(error) => eprintln!("skipped: groff does not start: {error}"),
        Ok(said) => {
            assert!(said.status.success() && said.stderr.is_empty(), "{}", String::from_utf8_lossy(&said.stderr));
        }
    }
}
