//! A running `buffstreams`: its output gathered as it comes, waited for with a deadline, killed when the test is done.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) use rustix::process::Signal;

/// Met only by a test that fails.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// The program, running.
pub(crate) struct Program {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Arc<Transcript>,
    stderr: Arc<Transcript>,
}

/// The program, when it has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Ended {
    pub(crate) fn code(&self) -> Option<i32> {
        self.status.code()
    }

    pub(crate) fn last_line(&self) -> &str {
        self.stderr.lines().last().unwrap_or_default()
    }

    /// The lines that say that something failed.
    pub(crate) fn errors(&self) -> Vec<&str> {
        self.stderr.lines().filter(|line| line.starts_with("error: ")).collect()
    }
}

impl Program {
    pub(crate) fn start(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Program {
        let program = Program::start_unread(arguments);
        program.read_stdout();
        program
    }

    /// The same, but nobody reads its standard output until [`read_stdout`](Program::read_stdout).
    pub(crate) fn start_unread(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Program {
        Program::spawn(arguments, Stdio::piped(), Stdio::piped(), None)
    }

    /// The same, with a standard output of the test's own.
    pub(crate) fn start_into(
        stdout: impl Into<Stdio>,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Program {
        Program::spawn(arguments, stdout.into(), Stdio::piped(), None)
    }

    /// The same, where a file that would grow beyond so many KiB is refused, as a full disk refuses it.
    #[cfg(target_os = "linux")]
    pub(crate) fn start_on_full_disk(
        kibibytes: u32,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Program {
        Program::start_behind(&format!(r#"trap "" XFSZ; ulimit -f {kibibytes}"#), arguments)
    }

    /// The same, as `nohup` starts it.
    #[cfg(target_os = "linux")]
    pub(crate) fn start_deaf_to_hangups(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Program {
        Program::start_behind(r#"trap "" HUP"#, arguments)
    }

    /// The same, in a shell that was told this before.
    #[cfg(target_os = "linux")]
    fn start_behind(words: &str, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Program {
        let mut shell = Command::new("bash");
        let program = env!("CARGO_BIN_EXE_buffstreams");
        shell.args(["-c", &format!(r#"{words}; exec "$@""#), "sh", program]).args(arguments);
        let program = Program::of(&mut shell, Stdio::piped(), Stdio::piped(), Stdio::piped(), None);
        program.read_stdout();
        program
    }

    /// The same, with a terminal for its standard error.
    pub(crate) fn start_on_terminal(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Program {
        Program::start_on_terminal_in(&[], arguments)
    }

    /// The same, with these variables in its environment.
    pub(crate) fn start_on_terminal_in(
        environment: &[(&str, &str)],
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Program {
        let (Terminal { ours }, theirs) = Terminal::open();
        let program = Program::spawn_in(environment, arguments, Stdio::piped(), theirs.into(), Some(Box::new(ours)));
        program.read_stdout();
        program
    }

    /// The same, with a terminal of this size for its standard input and output: what it shows is its standard output.
    pub(crate) fn start_inside(
        (columns, rows): (u16, u16),
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> (Program, Terminal) {
        let (terminal, theirs) = Terminal::open();
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&terminal.ours, size).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_buffstreams"))
            .args(arguments)
            .stdin(theirs.try_clone().unwrap())
            .stdout(theirs)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary that cargo built starts");
        let stdout = Transcript::new(Some(Box::new(terminal.ours.try_clone().unwrap())));
        let stderr = Transcript::new(child.stderr.take().map(|pipe| Box::new(pipe) as _));
        stderr.read();
        stdout.read();
        (Program { child, stdin: None, stdout, stderr }, terminal)
    }

    /// In a session of its own, whose terminal this is; its output is in pipes all the same.
    #[cfg(target_os = "linux")]
    pub(crate) fn start_in_session_of_terminal(
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> (Program, Terminal) {
        let (terminal, theirs) = Terminal::open();
        let mut command = Command::new("setsid");
        command.args(["--ctty", env!("CARGO_BIN_EXE_buffstreams")]).args(arguments);
        let program = Program::of(&mut command, theirs.into(), Stdio::piped(), Stdio::piped(), None);
        program.read_stdout();
        (program, terminal)
    }

    fn spawn(
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
        stdout: Stdio,
        stderr: Stdio,
        terminal: Option<Box<dyn Read + Send>>,
    ) -> Program {
        Program::spawn_in(&[], arguments, stdout, stderr, terminal)
    }

    fn spawn_in(
        environment: &[(&str, &str)],
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
        stdout: Stdio,
        stderr: Stdio,
        terminal: Option<Box<dyn Read + Send>>,
    ) -> Program {
        let mut command = Command::new(env!("CARGO_BIN_EXE_buffstreams"));
        command.envs(environment.iter().copied()).args(arguments);
        Program::of(&mut command, Stdio::piped(), stdout, stderr, terminal)
    }

    fn of(
        command: &mut Command,
        stdin: Stdio,
        stdout: Stdio,
        stderr: Stdio,
        terminal: Option<Box<dyn Read + Send>>,
    ) -> Program {
        let command = command.stdin(stdin).stdout(stdout).stderr(stderr);
        let mut child = command.spawn().expect("the binary that cargo built starts");
        let stdin = child.stdin.take();
        let stdout = Transcript::new(child.stdout.take().map(|pipe| Box::new(pipe) as _));
        let stderr = Transcript::new(terminal.or(child.stderr.take().map(|pipe| Box::new(pipe) as _)));
        stderr.read();
        Program { child, stdin, stdout, stderr }
    }

    /// Runs it to its end with this standard input.
    pub(crate) fn run(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>, stdin: &[u8]) -> Ended {
        let mut program = Program::start(arguments);
        program.write_all_and_close(stdin);
        program.end()
    }

    /// A `listen` that is ready, on any free port of this machine.
    pub(crate) fn listen(options: &[&str]) -> (Program, String) {
        Program::listen_on("127.0.0.1", options)
    }

    /// The same on another address of the loopback, whose ports no other test takes when this one gives them up.
    pub(crate) fn listen_on(host: &str, options: &[&str]) -> (Program, String) {
        let host = if cfg!(target_os = "linux") { host } else { "127.0.0.1" };
        let program = Program::start(["listen", &format!("{host}:0")].iter().chain(options));
        let address = program.address();
        (program, address)
    }

    /// Where it says that it listens.
    pub(crate) fn address(&self) -> String {
        self.stderr.wait("a line that says where it listens", |text| {
            let first = text.split_inclusive(|byte| *byte == b'\n').next().filter(|line| line.ends_with(b"\n"))?;
            let first = String::from_utf8_lossy(first);
            let address = first.strip_prefix("listening on ");
            Some(address.unwrap_or_else(|| panic!("the first line is {first:?}")).trim_end().to_owned())
        })
    }

    pub(crate) fn read_stdout(&self) {
        self.stdout.read();
    }

    /// Closes the reading end of its standard output.
    pub(crate) fn drop_stdout(&self) {
        drop(self.stdout.pipe.lock().unwrap().take());
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("its standard input is still open");
        stdin.write_all(bytes).unwrap();
        stdin.flush().unwrap();
    }

    /// Its standard input, for a thread of the test's own.
    pub(crate) fn take_stdin(&mut self) -> ChildStdin {
        self.stdin.take().expect("its standard input is still open")
    }

    /// Writes as much as it reads, and then ends its input; it may well end before that.
    pub(crate) fn write_all_and_close(&mut self, bytes: &[u8]) {
        let _ = self.take_stdin().write_all(bytes);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let id = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(id, signal).unwrap();
    }

    /// Stops it, and waits until none of its threads runs any more: the signal alone is only a request.
    pub(crate) fn stop(&self) {
        self.signal(Signal::STOP);
        let is_stopped = |thread: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(thread.unwrap().path().join("stat")).unwrap();
            stat.rsplit_once(") ").unwrap().1.starts_with('T')
        };
        let deadline = Instant::now() + DEADLINE;
        while !std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().all(is_stopped) {
            assert!(Instant::now() < deadline, "it was not stopped");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until what it printed satisfies `look`.
    pub(crate) fn wait_stdout<T>(&self, what: &str, look: impl FnMut(&[u8]) -> Option<T>) -> T {
        self.stdout.wait(what, look)
    }

    pub(crate) fn wait_stderr<T>(&self, what: &str, look: impl FnMut(&[u8]) -> Option<T>) -> T {
        self.stderr.wait(what, look)
    }

    /// Waits until it has printed so many whole lines.
    pub(crate) fn wait_lines(&self, lines: usize) {
        self.wait_stdout(&format!("{lines} lines"), |text| {
            (text.iter().filter(|byte| **byte == b'\n').count() >= lines).then_some(())
        });
    }

    /// Waits until it ends by itself.
    pub(crate) fn end(mut self) -> Ended {
        let deadline = Instant::now() + DEADLINE;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > deadline => {
                    panic!("still running; it said: {}", String::from_utf8_lossy(&self.stderr.now()))
                }
                // The one thing that cannot be waited for with a deadline without unsafe code.
                None => thread::sleep(Duration::from_millis(2)),
            }
        };
        self.stdin = None;
        Ended {
            status,
            stdout: self.stdout.end(),
            stderr: String::from_utf8(self.stderr.end()).expect("what it says is UTF-8"),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A terminal of the test's own, as whoever sits before it has it.
pub(crate) struct Terminal {
    ours: File,
}

impl Terminal {
    pub(crate) fn type_in(&mut self, keys: &[u8]) {
        self.ours.write_all(keys).unwrap();
    }

    /// Closes it, as one closes a window.
    #[cfg(target_os = "linux")]
    pub(crate) fn hang_up(self) {}

    /// Whether it gathers lines, as a shell leaves it to its programs, and not single keys.
    pub(crate) fn gathers_lines(&self) -> bool {
        use rustix::termios::{LocalModes, tcgetattr};
        tcgetattr(&self.ours).unwrap().local_modes.contains(LocalModes::ICANON | LocalModes::ECHO)
    }

    /// With the end that a program has.
    fn open() -> (Terminal, File) {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
        // A program that another test starts meanwhile would keep it from being hung up.
        #[cfg(target_os = "linux")]
        let flags = flags | OpenptFlags::CLOEXEC;
        let ours = openpt(flags).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let name = ptsname(&ours, Vec::new()).unwrap();
        let theirs = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        (Terminal { ours: File::from(ours) }, theirs)
    }
}

/// What a pipe has brought so far.
struct Transcript {
    pipe: Mutex<Option<Box<dyn Read + Send>>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    reading: bool,
    ended: bool,
}

impl Transcript {
    fn new(pipe: Option<Box<dyn Read + Send>>) -> Arc<Transcript> {
        Arc::new(Transcript { pipe: Mutex::new(pipe), state: Mutex::default(), changed: Condvar::new() })
    }

    fn read(self: &Arc<Self>) {
        let Some(mut pipe) = self.pipe.lock().unwrap().take() else { return };
        self.state.lock().unwrap().reading = true;
        let this = Arc::clone(self);
        thread::spawn(move || {
            let mut buffer = [0; 64 * 1024];
            loop {
                let read = pipe.read(&mut buffer).unwrap_or(0);
                let mut state = this.state.lock().unwrap();
                state.bytes.extend_from_slice(&buffer[..read]);
                state.ended = read == 0;
                this.changed.notify_all();
                if read == 0 {
                    return;
                }
            }
        });
    }

    fn now(&self) -> Vec<u8> {
        self.state.lock().unwrap().bytes.clone()
    }

    fn end(&self) -> Vec<u8> {
        if self.state.lock().unwrap().reading {
            self.wait_for("its end", |state| state.ended.then_some(()));
        }
        self.now()
    }

    fn wait<T>(&self, what: &str, mut look: impl FnMut(&[u8]) -> Option<T>) -> T {
        self.wait_for(what, |state| {
            let found = look(&state.bytes);
            assert!(
                found.is_some() || !state.ended,
                "it ended without {what}: {}",
                String::from_utf8_lossy(&state.bytes)
            );
            found
        })
    }

    fn wait_for<T>(&self, what: &str, mut look: impl FnMut(&State) -> Option<T>) -> T {
        let deadline = Instant::now() + DEADLINE;
        let mut state = self.state.lock().unwrap();
        loop {
            if let Some(found) = look(&state) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited too long for {what}: {}", String::from_utf8_lossy(&state.bytes));
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
    }
}

/// A directory of the test's own, gone when it ends.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn file(&self, name: &str, content: &[u8]) -> String {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        text(&path)
    }
}

pub(crate) fn text(path: &Path) -> String {
    path.to_str().expect("paths of tests are UTF-8").to_owned()
}

/// The schemas and samples in `tests/data`.
pub(crate) fn data(path: &str) -> String {
    format!("{}/tests/data/{path}", env!("CARGO_MANIFEST_DIR"))
}
